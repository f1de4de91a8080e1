"""What is wrong with a value, in plain words instead of pydantic's: of a request's fields and of settings."""

import json
from collections.abc import Mapping
from typing import Any

LONGEST_ECHO = 60
"""Characters of a wrong value that are repeated."""

_WANTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_type": "a string",
    "tuple_type": "a list",
}
"""What a field takes, by pydantic's name of the error."""

_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
}


def complaint(found: Mapping[str, Any]) -> str:
    """Return what pydantic found wrong with one value, to be read after the field's name.

    A value is repeated where it is no text of a user's; of others only the kind is named.
    """
    kind, context = str(found["type"]), found.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind in _WANTED:
        # The tag of a union whose other half is a list.
        wanted = "a string or a list" if found["loc"] and found["loc"][-1] == "(text)" else _WANTED[kind]
        return f"must be {wanted}{_got(found)}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]:g}{_got(found)}"
    if kind in ("literal_error", "enum"):
        return f"must be {context['expected']}{_got(found, with_text=True)}"
    if kind in ("too_short", "too_long", "string_too_short"):
        return _wrong_length(kind, context)
    return str(found["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")


def shortened(text: str) -> str:
    """Return `text`, cut where it is too long to be repeated."""
    return text if len(text) <= LONGEST_ECHO else f"{text[:LONGEST_ECHO]}..."


def _wrong_length(kind: str, context: Mapping[str, Any]) -> str:
    words, limit = ("at most", context["max_length"]) if kind == "too_long" else ("at least", context["min_length"])
    unit = "character" if kind == "string_too_short" or context.get("field_type") == "Value" else "item"
    got = f", got {context['actual_length']}" if "actual_length" in context else ""
    return f"must have {words} {limit} {unit}{'' if limit == 1 else 's'}{got}"


def _got(found: Mapping[str, Any], *, with_text: bool = False) -> str:
    """Return the value that came, as JSON spells it; nothing where pydantic was told to hide it."""
    if "input" not in found:
        return ""
    match found["input"]:
        case list():
            return ", got a list"
        case dict():
            return ", got an object"
        case str() as text:
            return f", got {shortened(repr(text))}" if with_text else ", got a string"
        case value:
            return f", got {shortened(json.dumps(value))}"
