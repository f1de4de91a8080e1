"""Read labelled rows from JSON lines, templates or the Hub. A row that does not fit is named by file and line."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.chat import Message
from training.config import Kind, Source
from training.records import credit, label_of, records, text_of
from training.rows import Row, key_of

Labelled = tuple[str | None, int | None, int | None]
"""Response, request label, response label."""


def read(group: str, source: Source, data: Path) -> list[Row]:
    """Return every row of a source that matches it, in file order.

    Args:
        group: the source's name in the recipe.
        source: where it is and how it is read.
        data: folder of local files.

    Raises:
        DataError: if the file or data set cannot be read, or a row misses a documented field.
    """
    left_out = {key for path in source.without for key in _keys(replace(source, path=path), data)}
    rows = []
    for where, record in records(source, data):
        name, licence = credit(record, source, where)
        if not name.startswith(source.match):
            continue
        prompt = text_of(record, "prompt", where)
        if key_of(prompt) in left_out:
            continue
        for response, request_label, response_label in _BUILDERS[source.kind](record, source, where):
            response_label = response_label if response or source.kind == "own_answers" else None
            row = Row(
                group,
                name,
                licence,
                (Message("user", prompt),),
                response or None,
                request_label,
                response_label,
                source.request_weight,
                source.response_weight,
            )
            if row.has_label:
                rows.append(row)
    return rows


def _keys(source: Source, data: Path) -> Iterator[str]:
    """Yield the key of every prompt of a file."""
    for where, record in records(source, data):
        yield key_of(text_of(record, "prompt", where))


def _responses(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(text_of(record, "response", where), source.request_label, label_of(record, where))]


def _triplets(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(text_of(record, "harmful_response", where), 1, 1), (text_of(record, "refusal", where), 1, 0)]


def _refusals(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(text_of(record, "response", where), 1, 0)]


def _instructions(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(text_of(record, "response", where), 0, 0)]


def _prompts(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(None, label_of(record, where), None)]


def _benign_prompts(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(None, 0, None)]


def _own_answers(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(None, 0, 0)]


_BUILDERS: dict[Kind, Callable[[Mapping[str, Any], Source, str], list[Labelled]]] = {
    "responses": _responses,
    "triplets": _triplets,
    "refusals": _refusals,
    "instructions": _instructions,
    "prompts": _prompts,
    "benign_prompts": _benign_prompts,
    "own_answers": _own_answers,
}
