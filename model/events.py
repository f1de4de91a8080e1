"""What a generation tells its caller, step by step."""

from dataclasses import dataclass
from typing import Literal

from model.holdback import ResponseToken

Action = Literal["none", "refused", "rolled_back"]
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Release:
    """Text and tokens that leave now; both may be empty."""

    text: str = ""
    tokens: tuple[ResponseToken, ...] = ()
    is_refusal: bool = False
    head_s: float = 0.0
    """Seconds that the head took in this step; 0 where it was not read."""


@dataclass(frozen=True)
class Finish:
    """How a response ended. Comes once, last."""

    reason: FinishReason
    action: Action
    request_risk: float | None
    response_risk: float | None
    """Of the response as generated, withdrawn tokens included; None without an assessment."""
    num_assessments: int
    num_withdrawn_tokens: int
    num_head_failures: int
    prompt_tokens: int
    completion_tokens: int
    """Tokens released, those of a refusal included."""


Event = Release | Finish
