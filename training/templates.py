"""Labelled requests from templates with slots: a few sentences of one's own teach what a label means.

A templates file is YAML: `source` as in a JSON line, and `groups`. Each group has `harmful` (0 or 1),
`rows` (how many different requests to draw), `templates` (texts with `{slot}` in them) and `slots` (what
may stand there). A harmful group and a harmless one with the same templates teach the difference alone.
"""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from training.config import STRICT, AtLeastOne
from training.errors import DataError

SHIPPED = Path(__file__).resolve().parent / "texts"
"""Templates files that come with this release."""

Texts = Annotated[tuple[str, ...], Field(min_length=1)]
TRIES_PER_ROW = 20
"""A group that gives no new request in this many draws is exhausted."""


@dataclass(frozen=True, config=STRICT)
class Group:
    """Requests of one label."""

    harmful: Literal[0, 1]
    rows: AtLeastOne
    templates: Texts
    slots: dict[str, Texts] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Templates:
    """The content of a templates file."""

    source: str
    groups: tuple[Group, ...]


def expand(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a record with `prompt`, `harmful` and `source` for each request, and the group that it is of.

    The draw depends on the file alone, so a file always gives the same requests.

    Raises:
        DataError: naming file and field, if it is no templates file.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        templates = TypeAdapter(Templates).validate_python(raw)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DataError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for number, group in enumerate(templates.groups, start=1):
        where = f"{path}, group {number}"
        for prompt in _draw(group, random.Random(number), where):
            yield where, {"prompt": prompt, "harmful": group.harmful, "source": templates.source}


def _draw(group: Group, rng: random.Random, where: str) -> list[str]:
    """Return up to `rows` different requests."""
    drawn: dict[str, None] = {}
    for _ in range(group.rows * TRIES_PER_ROW):
        slots = {name: rng.choice(texts) for name, texts in group.slots.items()}
        try:
            drawn[rng.choice(group.templates).format_map(slots).strip()] = None
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(f"{where}: a template does not fit the slots {sorted(slots)}: {error}") from error
        if len(drawn) == group.rows:
            break
    return list(drawn)
