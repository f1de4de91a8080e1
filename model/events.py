"""What a generation tells its caller, step by step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.holdback import ResponseToken

Action = Literal["none", "refused", "rolled_back"]
FinishReason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class HeadWork:
    """What the head did in one forward pass, or in several together."""

    num_assessments: int = 0
    num_failures: int = 0
    """Assessments without a finite number; they count as unsafe."""
    seconds: float = 0.0

    @classmethod
    def of(cls, logits: Sequence[float], seconds: float) -> "HeadWork":
        """Return the work of one pass that gave `logits`, one per assessment."""
        return cls(len(logits), sum(not math.isfinite(logit) for logit in logits), seconds)

    def __add__(self, other: "HeadWork") -> "HeadWork":
        if self is NO_WORK:
            return other
        return HeadWork(
            self.num_assessments + other.num_assessments,
            self.num_failures + other.num_failures,
            self.seconds + other.seconds,
        )


NO_WORK = HeadWork()


@dataclass(frozen=True)
class Release:
    """Text and tokens that leave now; both may be empty."""

    text: str = ""
    tokens: tuple[ResponseToken, ...] = ()
    is_refusal: bool = False
    head: HeadWork = NO_WORK
    """What the head did in this step."""
    num_held: int = 0
    """Tokens of the response that were drawn and are held back after this."""


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
    is_redrawn: bool
    """A refusal of the model's own was withdrawn, as the request is clear, and the response drawn again."""
    num_request_failures: int
    """Assessments of the request on which the head failed."""
    num_response_failures: int
    prompt_tokens: int
    completion_tokens: int
    """Tokens released, those of a refusal included."""

    @property
    def num_head_failures(self) -> int:
        """Assessments of either side on which the head failed."""
        return self.num_request_failures + self.num_response_failures


Event = Release | Finish
