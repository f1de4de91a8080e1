"""Shapes of the in-band `moderation` field and of `/v1/moderations`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.protocol.shared import MOST_ITEMS, RequestModel, ResponseModel, Salt, Text, TextPart

UNSAFE = "unsafe"
"""Our category: the one that the safety signal judges."""

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""The categories that the OpenAI API requires. The signal does not judge them apart."""

MAX_INPUTS = 1024


class SidePolicy(RequestModel):
    """What is done on one side: `score` observes, `block` acts."""

    mode: Literal["score", "block"]
    """`score` reports the risk and changes nothing; `block` refuses or rolls back."""


class PolicyRequest(RequestModel):
    """Modes of both sides. A side left out keeps the server's mode."""

    input: SidePolicy | None = None
    """The request side."""
    output: SidePolicy | None = None
    """The response side."""


class Moderation(RequestModel):
    """The in-band request field."""

    model: str
    """The served model, or an alias for it such as `omni-moderation-latest`."""
    policy: PolicyRequest | None = None
    """What is done on each side; the server's policy unless given."""


class InBandResult(ResponseModel):
    """Judgement of one text; the categories are free, ours is `unsafe`."""

    type: Literal["moderation_result"] = "moderation_result"
    model: str
    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text", "image"]]]


class InBandSide(ResponseModel):
    """Judgements of one side: one of the input, or one per choice of the output.

    `results` is empty where the side is not scored, or where the key may not see judgements.
    """

    type: Literal["moderation_results"] = "moderation_results"
    model: str
    results: list[InBandResult]


class InBandError(ResponseModel):
    """In place of the judgements of a side on which the safety head failed; the policy counts that as unsafe."""

    type: Literal["error"] = "error"
    code: str
    message: str


class InBandModeration(ResponseModel):
    """The in-band response object; present only if the request had the field."""

    input: InBandSide | InBandError
    output: InBandSide | InBandError


def _input_kind(value: Any) -> str:
    if not isinstance(value, list):
        return "(text)"
    return "(parts)" if any(isinstance(item, dict) for item in value) else "(texts)"


Input = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS), Tag("(texts)")]
    | Annotated[list[TextPart], Field(fail_fast=True, max_length=MOST_ITEMS), Tag("(parts)")],
    Discriminator(_input_kind),
]
"""A text, a list of texts, or one text in parts. Tags in parentheses stay out of error messages."""


class ModerationRequest(RequestModel):
    """Body of `/v1/moderations`."""

    input: Input
    """A text, a list of texts, or one text in parts."""
    model: str | None = None
    """The served model or an alias for it; it may be left out."""
    cache_salt: Salt | None = None
    """Work on texts that begin alike is shared only with requests of the same salt, or all without one."""

    @property
    def texts(self) -> list[str]:
        """The texts to judge; parts are one text together."""
        if isinstance(self.input, str):
            return [self.input]
        parts = [item.text for item in self.input if isinstance(item, TextPart)]
        return ["\n".join(parts)] if parts else [item for item in self.input if isinstance(item, str)]


class ModerationResult(ResponseModel):
    """Judgement of one text.

    The safety signal has one score, the request risk, and it stands under `unsafe`. In the other 13
    categories `false` and 0 mean *not judged*; they do not mean that the text is safe in that respect.
    """

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text", "image"]]]


class ModerationResponse(ResponseModel):
    """Answer of `/v1/moderations`: one result per text, in order."""

    id: str
    model: str
    results: list[ModerationResult]
