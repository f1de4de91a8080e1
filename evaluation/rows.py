"""Labelled rows of a JSON lines file or of the Hub, and the source that each belongs to."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.pretrained import sha256_of

HUB = "hub:"
"""Begins the name of a data set of the Hub."""
SOURCE_PARTS = (" (", "/")
"""What follows the name of a source: a licence, or a subset such as a prompt type."""


@dataclass(frozen=True)
class Row:
    """One text to score; `label` is 1 for harmful, 0 for harmless."""

    source: str
    prompt: str
    response: str | None
    label: int

    @property
    def key(self) -> str:
        """SHA-256 of the text: names the row in results, which hold no texts."""
        return hashlib.sha256(json.dumps([self.prompt, self.response]).encode()).hexdigest()[:16]


def read(path: Path, *, label: int | None = None, response: str | None = None) -> list[Row]:
    """Return the rows of `path`, in its order.

    Args:
        path: JSON lines with `prompt`, and where they apply `response`, `harmful` and `source`; or `hub:NAME` or
            `hub:NAME:SPLIT`, a data set of the Hub with these fields.
        label: return only rows of this label, which is that of rows that carry none.
        response: another field to read the response from, which every row must have.

    Raises:
        ValueError: naming file and line of a row that cannot be read, or the data set that cannot be loaded.
    """
    rows = []
    lines: Iterable[str | bytes] = _hub(path) if is_of_hub(path) else _lines(path)
    for number, line in enumerate(lines, start=1):
        try:
            raw = json.loads(line)
            found = raw["harmful"] if label is None else raw.get("harmful", label)
            text = raw.get("response") if response is None else raw[response]
            rows.append(Row(_source(raw.get("source", path.stem)), *_checked(raw["prompt"], text, found)))
        # A ValueError is raised for bytes that are not UTF-8 too.
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            said = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {number}: not a labelled row: {said}") from error
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return [row for row in rows if label is None or row.label == label]


def is_of_hub(path: Path) -> bool:
    """Tell whether rows are those of a data set of the Hub."""
    return str(path).startswith(HUB)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, or of the rows of a data set of the Hub as JSON lines.

    Raises:
        ValueError: if the data set cannot be loaded.
    """
    return hashlib.sha256("\n".join(_hub(path)).encode()).hexdigest() if is_of_hub(path) else sha256_of(path)


def sample(rows: Iterable[Row], n: int) -> list[Row]:
    """Return the `n` different rows whose hashes come first, or all: a random sample, and always the same."""
    return sorted({row.key: row for row in rows}.values(), key=lambda row: row.key)[:n]


def select(path: Path, n: int, *, label: int, source: str = "", response: str | None = None) -> list[Row]:
    """Return all different rows of `n` prompts, a random sample of prompts that is always the same.

    Args:
        path: as `read` takes it, as are `label` and `response`.
        n: most prompts.
        label: 1 for harmful rows, 0 for harmless ones.
        source: only rows whose source begins with this.
        response: the field of the response, of which a prompt may have several.

    Raises:
        ValueError: if a row cannot be read, or none is left.
    """
    rows = [row for row in read(path, label=label, response=response) if row.source.startswith(source)]
    if not rows:
        kind = "harmful" if label else "harmless"
        raise ValueError(f"{path} holds no {kind} row whose source begins with {source!r}")
    chosen = {row.prompt for row in sample((replace(row, response=None) for row in rows), n)}
    return list({row.key: row for row in rows if row.prompt in chosen}.values())


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _hub(path: Path) -> Iterator[str]:
    """Yield the rows of a data set as JSON.

    Raises:
        ValueError: if it cannot be loaded.
    """
    name, _, split = str(path).removeprefix(HUB).partition(":")
    try:
        from datasets import load_dataset  # here, because it takes seconds to import

        loaded: Iterable[Any] = load_dataset(name, split=split or "train")
    except Exception as error:  # the Hub client's errors share no base class
        raise ValueError(f"cannot load data set {name!r}: {' '.join(str(error).split())}") from error
    for row in loaded:
        yield json.dumps(row, default=str)


def _checked(prompt: Any, response: Any, label: Any) -> tuple[str, str | None, int]:
    """Return the fields of a row, if they are what they must be.

    Raises:
        ValueError: naming one that is not.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"prompt must be a text, got {prompt!r}")
    if response is not None and not isinstance(response, str):
        raise ValueError(f"a response must be a text or null, got {response!r}")
    if label not in (0, 1):  # true and false are these
        raise ValueError(f"harmful must be true, false, 1 or 0, got {label!r}")
    return prompt, response, int(label)


def _source(name: str) -> str:
    for part in SOURCE_PARTS:
        name = name.split(part)[0]
    return name
