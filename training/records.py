"""Records from JSON lines, templates or the Hub, and their documented fields. A bad one is named by file and line."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from training.errors import DataError
from training.rows import split_source
from training.templates import SHIPPED, expand


class Origin(Protocol):
    """Where records come from."""

    @property
    def path(self) -> str:
        """A .jsonl file, or a .yaml file of templates, relative to the folder of the data; or a Hub id."""
        ...

    @property
    def credit(self) -> str:
        """`Name (LICENCE)` for records without a `source` field."""
        ...

    @property
    def split(self) -> str:
        """Split of a Hub data set."""
        ...


def local_file(source: Origin, data: Path) -> Path | None:
    """Return the local file of a source: in `data`, here, or among the shipped templates; None for a Hub id."""
    places = (data / source.path, Path(source.path), SHIPPED / source.path)  # an absolute path stays itself
    return next((path for path in places if path.is_file()), None)


def records(source: Origin, data: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each record with the place that an error message names.

    Raises:
        DataError: if the file or data set cannot be read, or holds something else than objects.
    """
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


def _hub(source: Origin) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from datasets import load_dataset  # here, because it takes seconds to import

    try:
        loaded = load_dataset(source.path, split=source.split)
    except Exception as error:  # the Hub client's errors share no base class
        raise DataError(f"cannot load data set {source.path!r}: {' '.join(str(error).split())}") from error
    for number, record in enumerate(loaded, start=1):
        yield f"{source.path}[{source.split}]:{number}", record


def credit(record: Mapping[str, Any], source: Origin, where: str) -> tuple[str, str]:
    """Return name and licence of the record's origin.

    Raises:
        DataError: if neither the record nor the source names them.
    """
    text = text_of(record, "source", where) if "source" in record or not source.credit else source.credit
    found = split_source(text)
    if found is None:
        raise DataError(f"{where}: source must end with its licence, as in 'Name (MIT)', got {text!r}")
    return found


def text_of(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return a text field of a record.

    Raises:
        DataError: if it is missing, no string, or not valid Unicode.
    """
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


def label_of(record: Mapping[str, Any], where: str) -> int:
    """Return the field `harmful` of a record.

    Raises:
        DataError: if it is missing, or neither 0 nor 1.
    """
    if "harmful" not in record:
        raise DataError(f"{where}: field 'harmful' is missing; found {sorted(record)}")
    if record["harmful"] not in (0, 1):
        raise DataError(f"{where}: field 'harmful' must be 0 or 1, got {record['harmful']!r}")
    return int(record["harmful"])
