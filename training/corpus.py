"""Which rows a run uses, and in which part each stands. Deterministic, and stable under small changes.

Sampling orders rows by a keyed hash, so a higher limit keeps the rows of a lower one, and the states
computed for them.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from training.config import HeadRecipe, Source
from training.errors import DataError
from training.rows import Part, Row, is_permissive, is_validation
from training.sources import read

Answer = Callable[[Sequence[Row]], list[str]]
"""Gives the served model's answers to rows without a response."""


def assemble(recipe: HeadRecipe, answer: Answer) -> list[Row]:
    """Return the sampled rows of all sources, each in its part, in the recipe's order of sources.

    A prompt whose request label an earlier source taught already is not taken again without a response.

    Args:
        recipe: sources, limits, seed and licence filter.
        answer: called once, with the sampled rows of the `own_answers` sources.

    Raises:
        DataError: if a source cannot be read or leaves no row, or there is none to train on.
    """
    chosen: list[Row] = []
    known: set[tuple[str, int | None]] = set()
    for group, source in recipe.sources.items():
        rows = read(group, source, Path(recipe.data))
        if not rows:
            raise DataError(f"sources.{group}: no row of {source.path} has a source that begins with {source.match!r}")
        rows = [row for row in rows if _is_allowed(row, recipe)]
        rows = [row for row in rows if _is_answered(row, source) or (row.key, row.request_label) not in known]
        rows = sample(rows, source.limit, recipe.seed)
        known.update((row.key, row.request_label) for row in rows)
        chosen.extend(rows)
    return assign_parts(_with_answers(chosen, recipe, answer), recipe)


def sample(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Return `limit` different rows, or all, in an order that only their text and `seed` decide."""
    unique = {_digest(seed, row.prompt, row.response or ""): row for row in rows}
    return [unique[digest] for digest in sorted(unique)][:limit]


def assign_parts(rows: Sequence[Row], recipe: HeadRecipe) -> list[Row]:
    """Return the rows with their parts: no prompt stands in two.

    Reserved prompts are calibration; of the others, a hash sends the recipe's share to validation.

    Raises:
        DataError: if no row is left to train or to validate on.
    """
    reserved = {key for group, source in recipe.sources.items() for key in _reserved(rows, group, source)}

    def part(row: Row) -> Part:
        if row.key in reserved:
            return "calibration"
        return "validation" if is_validation(row.key, recipe.seed, recipe.validation) else "train"

    placed = [replace(row, part=part(row)) for row in rows]
    for name in ("train", "validation"):
        if not any(row.part == name for row in placed):
            raise DataError(f"no row is left in the {name} part; {len(placed)} rows came from {recipe.data}")
    return placed


def _reserved(rows: Sequence[Row], group: str, source: Source) -> list[str]:
    """Return the prompt keys that a source keeps for calibration."""
    keys = dict.fromkeys(row.key for row in rows if row.group == group)
    return list(keys)[: source.calibration]


def _is_allowed(row: Row, recipe: HeadRecipe) -> bool:
    return not recipe.is_permissive_only or is_permissive(row.licence)


def _is_answered(row: Row, source: Source) -> bool:
    return row.response is not None or source.kind == "own_answers"


def _with_answers(rows: Sequence[Row], recipe: HeadRecipe, answer: Answer) -> list[Row]:
    """Return the rows with the model's answers filled in; those it answered with nothing are left out."""
    open_rows = [row for row in rows if recipe.sources[row.group].kind == "own_answers"]
    answers = iter(answer(open_rows) if open_rows else [])
    filled = []
    for row in rows:
        if recipe.sources[row.group].kind == "own_answers":
            row = replace(row, response=next(answers).strip() or None)
            if row.response is None:
                continue
        filled.append(row)
    return filled


def _digest(seed: int, *texts: str) -> str:
    return hashlib.sha256("\x00".join((str(seed), *texts)).encode()).hexdigest()
