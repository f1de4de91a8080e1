"""Rows for fine-tuning: a request with the response to learn, and perhaps with a harmful one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from training.config import Recipe
from training.errors import DataError
from training.records import credit, label_of, records, text_of
from training.refusals import refusal_of
from training.rows import is_permissive, is_validation, key_of
from training.shards import digest
from training.tune_config import AnchorRecipe, DialogueKind, DialogueSource, FitRecipe, Onset, Part


@dataclass(frozen=True)
class Prompt:
    """A request that the model shall answer itself."""

    source: str
    licence: str
    text: str

    @property
    def key(self) -> str:
        """As `training.rows.Row.key`."""
        return key_of(self.text)


@dataclass(frozen=True)
class Dialogue:
    """One request and the response that the model shall give."""

    source: str
    licence: str
    prompt: str
    response: str
    harmful: str | None = None
    """A harmful answer to the same request, where there is one."""
    request_label: int | None = None
    """1 where the request is malicious, 0 where it is not, None where nothing is known."""
    response_label: int | None = None
    """The same of the response."""
    is_complete: bool = True
    """The response ends where it ends; false where it was cut."""
    where: str = field(default="", compare=False, repr=False)
    """File and line, for error messages."""

    @property
    def key(self) -> str:
        """As `training.rows.Row.key`: where there is no prompt, of the response that a head would be taught."""
        return key_of(self.prompt or self.harmful or self.response)


L = TypeVar("L", Prompt, Dialogue)


def read_part(name: str, part: Part, recipe: FitRecipe) -> list[Dialogue]:
    """Return the dialogues of one part, in the order of its sources, but for prompts that a head validates on.

    Raises:
        DataError: if a source cannot be read, a row misses a field, or no row is left.
    """
    return _read(_dialogues, part.sources, recipe, f"row is left in the part {name!r}", recipe.validation)


def read_openings(name: str, onset: Onset, recipe: FitRecipe) -> list[Dialogue]:
    """Return the dialogues whose responses open made onsets.

    Raises:
        DataError: as `read_part`.
    """
    sources = {"openings": onset.openings}
    found = _read(_dialogues, sources, recipe, f"opening is left for the part {name!r}", recipe.validation)
    return [replace(row, is_complete=False) for row in found]  # what ends a response would give the turn away


def read_prompts(recipe: AnchorRecipe) -> list[Prompt]:
    """Return the prompts of all sources.

    Raises:
        DataError: if a source cannot be read, a row misses its prompt, or no row is left.
    """
    return _read(_prompts, recipe.sources, recipe, "prompt is left")


def _read(
    rows_of: Callable[[DialogueSource, Path], Iterator[L]],
    sources: Mapping[str, DialogueSource],
    recipe: Recipe,
    what: str,
    held_out: float = 0.0,
) -> list[L]:
    """Return the allowed rows of all sources but for a share of the prompts, or raise a DataError that no `what`."""
    folder = Path(recipe.data)
    found = [row for source in sources.values() for row in _sampled(rows_of(source, folder), source, recipe)]
    found = [row for row in found if not is_validation(row.key, recipe.seed, held_out)]
    if not found:
        under = " under a permissive licence" if recipe.is_permissive_only else ""
        raise DataError(f"no {what}{under}; the sources are {sorted(sources)}")
    return found


def _prompts(source: DialogueSource, data: Path) -> Iterator[Prompt]:
    for where, record in records(source, data):
        name, licence = credit(record, source, where)
        if name.startswith(source.match) and record.get("harmful") != 1:
            yield Prompt(name, licence, text_of(record, "prompt", where))


def _sampled(rows: Iterable[L], source: DialogueSource, recipe: Recipe) -> list[L]:
    """Return the source's number of allowed rows, in an order that only their text and the seed decide, or all."""
    allowed = [row for row in rows if not recipe.is_permissive_only or is_permissive(row.licence)]
    if source.limit is None or source.limit >= len(allowed):
        return allowed
    return sorted(allowed, key=lambda row: digest(recipe.seed, repr(row)))[: source.limit]


def _dialogues(source: DialogueSource, data: Path) -> Iterator[Dialogue]:
    for where, record in records(source, data):
        name, licence = credit(record, source, where)
        wants_harmful = source.kind == "requests" or (source.kind, source.response) == ("responses", "own_refusal")
        is_taken = not wants_harmful or label_of(record, where) == 1
        if name.startswith(source.match) and is_taken:
            prompt = text_of(record, "prompt", where) + source.suffix
            found = _RESPONSES[source.kind](record, source, where)
            is_complete = record.get("complete", True) is not False
            yield Dialogue(name, licence, prompt, *found, is_complete=is_complete, where=where)


Labelled = tuple[str, str | None, int | None, int | None]
"""Response, harmful answer, request label, response label."""


def _triplet(record: Mapping[str, Any], source: DialogueSource, where: str) -> Labelled:
    harmful = text_of(record, "harmful_response", where)
    if source.response == "harmful_response":
        return harmful, None, 1, 1
    if source.response == "own_refusal":
        return refusal_of(text_of(record, "prompt", where), harmful), harmful, 1, 0
    return text_of(record, "refusal", where), harmful, 1, 0


def _pair(record: Mapping[str, Any], source: DialogueSource, where: str) -> Labelled:
    return text_of(record, "response", where), None, source.request_label, source.response_label


def _refusal(record: Mapping[str, Any], source: DialogueSource, where: str) -> Labelled:
    if source.response == "own_refusal":
        return refusal_of(text_of(record, "prompt", where)), None, 1, 0
    return text_of(record, "response", where), None, 1, 0


def _response(record: Mapping[str, Any], source: DialogueSource, where: str) -> Labelled:
    if source.response == "own_refusal":
        harmful = text_of(record, "response", where)
        return refusal_of(text_of(record, "prompt", where), harmful), harmful, source.request_label, 0
    return text_of(record, "response", where), None, source.request_label, label_of(record, where)


def _request(record: Mapping[str, Any], source: DialogueSource, where: str) -> Labelled:
    return refusal_of(text_of(record, "prompt", where)), None, 1, 0


_RESPONSES: dict[DialogueKind, Callable[[Mapping[str, Any], DialogueSource, str], Labelled]] = {
    "triplets": _triplet,
    "refusals": _refusal,
    "pairs": _pair,
    "responses": _response,
    "requests": _request,
}
