"""Read labelled rows from JSON lines, templates or the Hub. A row that does not fit is named by file and line."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from model.chat import Message
from training.config import Kind, Source
from training.errors import DataError
from training.rows import Row, split_source
from training.templates import SHIPPED, expand

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
    rows = []
    for where, record in _records(source, data):
        name, licence = _credit(record, source, where)
        if not name.startswith(source.match):
            continue
        prompt = _text(record, "prompt", where)
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


def local_file(source: Source, data: Path) -> Path | None:
    """Return the local file of a source, in `data` or among the shipped templates, or None for a Hub id."""
    places = (data / source.path, SHIPPED / source.path)  # an absolute path stays itself
    return next((path for path in places if path.is_file()), None)


def _records(source: Source, data: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each record with the place that an error message names."""
    path = local_file(source, data)
    if path is not None:
        yield from expand(path) if path.suffix == ".yaml" else _lines(path)
    elif source.path.endswith((".jsonl", ".json", ".yaml")):
        raise DataError(f"{data / source.path} does not exist; set data=FOLDER to where the files are")
    else:
        yield from _hub(source)


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # also raised for bytes that are not UTF-8
                raise DataError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected an object, got {type(record).__name__}")
            yield where, record


def _hub(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset  # here, because it takes seconds to import

    try:
        loaded = load_dataset(source.path, split=source.split)
    except Exception as error:  # the Hub client's errors share no base class
        raise DataError(f"cannot load data set {source.path!r}: {' '.join(str(error).split())}") from error
    for number, record in enumerate(loaded, start=1):
        yield f"{source.path}[{source.split}]:{number}", record


def _credit(record: Mapping[str, Any], source: Source, where: str) -> tuple[str, str]:
    text = _text(record, "source", where) if "source" in record or not source.credit else source.credit
    credit = split_source(text)
    if credit is None:
        raise DataError(f"{where}: source must end with its licence, as in 'Name (MIT)', got {text!r}")
    return credit


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: field {field!r} is missing; found {sorted(record)}")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be a string, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {field!r} holds half a character (a lone surrogate)") from error
    return value


def _label(record: Mapping[str, Any], where: str) -> int:
    if "harmful" not in record:
        raise DataError(f"{where}: field 'harmful' is missing; found {sorted(record)}")
    if record["harmful"] not in (0, 1):
        raise DataError(f"{where}: field 'harmful' must be 0 or 1, got {record['harmful']!r}")
    return int(record["harmful"])


def _responses(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(_text(record, "response", where), source.request_label, _label(record, where))]


def _triplets(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(_text(record, "harmful_response", where), 1, 1), (_text(record, "refusal", where), 1, 0)]


def _refusals(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(_text(record, "response", where), 1, 0)]


def _instructions(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(_text(record, "response", where), 0, 0)]


def _prompts(record: Mapping[str, Any], source: Source, where: str) -> list[Labelled]:
    return [(None, _label(record, where), None)]


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
