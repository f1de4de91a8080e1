"""What every request body shares: strict types, and no field that is silently ignored."""

import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from server.complaint import shortened


def printable(text: str) -> str:
    """Return `text` with lone surrogates escaped, so that it can be encoded."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PydanticCustomError(
            "invalid_unicode",
            "holds the lone surrogate {code_point} at character {position}, which is not text",
            {"code_point": f"U+{ord(text[error.start]):04X}", "position": error.start},
        ) from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
"""A string that is valid Unicode; JSON escapes can spell others."""
MOST_ITEMS = 2048
"""Messages of a conversation, or parts of all of them: each is checked in the one thread that serves everybody. For the
same reason the first wrong item of a list is the last that is looked at (`fail_fast`)."""
Salt = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
"""Work on prompts that begin alike is shared only with requests of the same salt, or all without one."""


def at_most(number: int, what: str, count: Callable[[Any], int]) -> BeforeValidator:
    """Return a check that a field holds so many at most, before any of them is looked at.

    Args:
        number: how many.
        what: they are called, for the error.
        count: gives how many a value holds that may be of any type.
    """

    def check(value: Any) -> Any:
        if (found := count(value)) > number:
            message = f"must have at most {number} {what}, got {found}"
            raise PydanticCustomError("invalid_value", "{message}", {"message": message})
        return value

    return BeforeValidator(check)


def num_entries(value: Any) -> int:
    """Return how many entries an object has; 0 for what is none."""
    return len(value) if isinstance(value, dict) else 0


class RequestModel(BaseModel):
    """A request object in which every field is honoured or refused.

    `unsupported` lists fields that clients know but that would change the meaning here, each with the
    values that change nothing; those are accepted, as is null.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_be_honoured(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name not in cls.unsupported:
                raise _unknown(name, [*cls.model_fields, *cls.unsupported])
            elif value is not None and value not in cls.unsupported[name]:
                raise _unsupported(name, cls.unsupported[name])
        return kept


def _unknown(name: str, known: list[str]) -> PydanticCustomError:
    nearest = get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    field = printable(name)
    return PydanticCustomError("unknown_parameter", "is not a known field{hint}", {"field": field, "hint": hint})


def _unsupported(name: str, neutral: tuple[object, ...]) -> PydanticCustomError:
    allowed = f"; leave it out or send {' or '.join(map(json.dumps, neutral))}" if neutral else ""
    return PydanticCustomError(
        "unsupported_parameter", "is not supported{allowed}", {"field": name, "allowed": allowed}
    )


class ResponseModel(BaseModel):
    """An object of a response."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class TextPart(RequestModel):
    """A content part. Only text is supported."""

    type: Literal["text"]
    """The kind of part."""
    text: Text
    """Its text."""

    @model_validator(mode="before")
    @classmethod
    def _name_other_kinds(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "text":
            context = {"field": "type", "kind": printable(shortened(kind))}
            raise PydanticCustomError("unsupported_parameter", "'{kind}' is not supported, only text is", context)
        return data


class ErrorDetail(ResponseModel):
    """What went wrong. All four keys are always there."""

    message: str
    type: str
    param: str | None
    """Name of the offending field, as in `messages[0].content`."""
    code: str | None


class ErrorBody(ResponseModel):
    """Every error's body."""

    error: ErrorDetail
