"""Answers of `/v1/chat/completions`: whole, and in chunks.

Fields that are not set are left out when these are written, so a value of null is one that was set.
"""

from typing import Literal

from model.events import Action, FinishReason
from server.protocol.moderation import InBandModeration
from server.protocol.shared import ResponseModel


class TopLogprob(ResponseModel):
    """A likely token at one position."""

    token: str
    bytes: list[int] | None
    """UTF-8 of the token; null where it is a part of a character."""
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of the answer. A token that the server forced is certain: its log-probability is 0."""

    top_logprobs: list[TopLogprob]


class Logprobs(ResponseModel):
    """Log-probabilities of the tokens of an answer, apart from those of a refusal."""

    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class TokenRisk(ResponseModel):
    """A released token and its raw response risk; null where it was not assessed."""

    token_id: int
    token: str
    risk: float | None


class Safety(ResponseModel):
    """What the policy saw and did. Risks are null where the key may not see them."""

    action: Action
    request_risk: float | None
    response_risk: float | None
    """Of the response as generated, withdrawn tokens included."""
    num_assessments: int | None
    num_withdrawn_tokens: int | None
    trace: list[TokenRisk] | None = None


class Usage(ResponseModel):
    """Tokens; a withdrawn token does not count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(ResponseModel):
    """The answer. `content` is null, never an empty string, where there is no text."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(ResponseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason
    safety: Safety


class ChatCompletion(ResponseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str | None
    moderation: InBandModeration | None = None


class Delta(ResponseModel):
    """What a chunk adds to an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None


class ChunkChoice(ResponseModel):
    """One answer's part of a chunk; `safety` comes with the finish reason."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None
    safety: Safety | None = None


class ChatCompletionChunk(ResponseModel):
    """A part of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]
    moderation: InBandModeration | None = None
    usage: Usage | None = None
