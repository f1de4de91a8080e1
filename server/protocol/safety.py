"""Shapes of the `safety` object and of `/v1/safety/score`."""

from typing import Literal

from server.protocol.chat import Messages
from server.protocol.shared import RequestModel, ResponseModel, Salt


class ScoreRequest(RequestModel):
    """Body of `/v1/safety/score`."""

    model: str
    """Name of the served model, as `/v1/models` gives it."""
    messages: Messages
    """A last message of the assistant's is the response that is scored."""
    trace: bool | None = None
    """Report the risk at every token of the response."""
    cache_salt: Salt | None = None
    """Work on prompts that begin alike is shared only with requests of the same salt, or all without one."""


class Flagged(ResponseModel):
    """Whether each risk is over its `flag` threshold."""

    request: bool
    response: bool | None
    """Null where there is no response to judge."""


class RiskThresholds(ResponseModel):
    """The two thresholds of one risk."""

    block: float
    """What the policy acts on."""
    flag: float
    """What a classifier reports."""


class ScoreThresholds(ResponseModel):
    """The thresholds of both risks."""

    request: RiskThresholds
    response: RiskThresholds
    patience: int
    """Smoothed risks over `block` in a row, at which the policy acts on a response."""


class ScoredToken(ResponseModel):
    """One token of the response, with the assessment that covers the request and the response up to here."""

    token_id: int
    token: str
    risk: float
    """Raw response risk."""
    smoothed_risk: float
    """What is compared with the `block` threshold."""


class ScoreResponse(ResponseModel):
    """Answer of `/v1/safety/score`. Where risks may only be flagged, numbers are null."""

    id: str
    object: Literal["safety.score"] = "safety.score"
    model: str
    request_risk: float | None
    response_risk: float | None
    """Highest value of the lowest of `patience` consecutive smoothed risks, or the last one if that is
    higher; null without a response."""
    flagged: Flagged
    thresholds: ScoreThresholds | None
    trace: list[ScoredToken] | None = None
