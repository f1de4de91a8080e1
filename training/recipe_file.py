"""Read a recipe from YAML and `key=value` overrides, strictly: an unknown key names its nearest neighbour."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from training.errors import RecipeError

R = TypeVar("R")

SHIPPED = Path(__file__).resolve().parent / "recipes"
"""Recipes that come with this release."""


def load(kind: type[R], config: str, overrides: Sequence[str] = ()) -> R:
    """Return the recipe in the file `config`, or the shipped recipe of that name, with overrides applied.

    Args:
        kind: what recipe it is, such as `HeadRecipe`.
        config: a YAML file, or the name of a shipped recipe such as `head_all_rows`. Where it, or a group
            of it, holds the key `recipe`, the keys of the recipe of that name hold too.
        overrides: `key=value` each; dots lead into a group, and the value is YAML.

    Raises:
        RecipeError: if the file cannot be read, or a key or value is not valid.
    """
    raw = _included(_read(_find(config)))
    for override in overrides:
        _apply(raw, override)
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, kind)) from error


def dump(recipe: object, path: Path) -> None:
    """Write the resolved recipe as YAML that `load` reads back."""
    plain = TypeAdapter(type(recipe)).dump_python(recipe, mode="json")
    path.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _find(config: str) -> Path:
    for path in (Path(config).expanduser(), SHIPPED / f"{config}.yaml", SHIPPED / config):
        if path.is_file():
            return path
    raise RecipeError(f"no recipe {config!r}; shipped recipes are {sorted(p.stem for p in SHIPPED.glob('*.yaml'))}")


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected a mapping of recipe keys, got {type(raw).__name__}")
    return raw


def _included(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with the keys of its `recipe`, and of those of its groups, where it does not set them."""
    found = {key: _included(value) if isinstance(value, dict) else value for key, value in raw.items()}
    if isinstance(name := found.get("recipe"), str):
        del found["recipe"]
        return _merged(_included(_read(_find(name))), found)
    return found


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return both, group by group; a value of `above` wins."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _apply(raw: dict[str, Any], override: str) -> None:
    """Set one `key=value` in `raw`; a part of the key that leads nowhere is left to the validation."""
    key, equals, value = override.partition("=")
    *groups, last = key.split(".")
    if not equals or not all((*groups, last)):
        raise RecipeError(f"expected key=value, got {override!r}")
    target = raw
    for depth, group in enumerate(groups):
        if groups[:depth][-1:] in (["sources"], ["parts"]) and group not in target:
            raise RecipeError(_unknown(".".join(groups[: depth + 1]), target))
        target = target.setdefault(group, {})
        if not isinstance(target, dict):
            raise RecipeError(f"{'.'.join(groups[: depth + 1])} is a value, so {key} cannot be set")
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: {value!r} is not valid YAML") from error


def _explain(error: ValidationError, kind: type) -> str:
    """Return the first fault of a recipe in one line."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "unexpected_keyword_argument":
        return _unknown(where, _keys_at(kind, [str(part) for part in fault["loc"][:-1]]))
    if fault["type"] == "missing":
        return f"recipe key {where} is missing"
    if fault["type"] == "value_error":  # of several keys together: all of them would be no help
        return f"recipe{f' key {where}' if where else ''}: {fault['msg'].removeprefix('Value error, ')}"
    return f"recipe key {where}: {fault['msg']}, got {fault['input']!r}"


def _unknown(where: str, known: Iterable[Any]) -> str:
    """Return the message for an unknown dotted key, `known` being the keys of its group."""
    group, dot, key = where.rpartition(".")
    nearest = difflib.get_close_matches(key, [str(name) for name in known], n=1, cutoff=0.0)
    hint = f"; did you mean {group + dot + nearest[0]!r}?" if nearest else ""
    return f"unknown recipe key {where!r}{hint}"


def _keys_at(kind: Any, groups: Sequence[str]) -> list[str]:
    """Return the keys of the group of a `kind` that `groups` leads to."""
    for group in groups:
        kind = get_type_hints(kind)[group] if is_dataclass(kind) else get_args(kind)[1]
        kind = (
            next((one for one in get_args(kind) if is_dataclass(one)), kind) if type(None) in get_args(kind) else kind
        )
    return [entry.name for entry in fields(kind)]
