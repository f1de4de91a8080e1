"""Decide what to do with a sequence from its trace. Pure Python: no tensors, no I/O, no clock.

Source: Li & Kim 2025 (arXiv 2505.17072), strategic decoding: a forced refusal at a malicious start,
a rollback after `patience` malicious assessments in a row. Deviations: the run is counted in
assessments, so the rule means the same under every schedule; a rollback returns to the onset of the
risk, at most `lookback` tokens before the last clear assessment; the last assessment before an end
acts alone; and what is releasable is bounded so that no later decision can withdraw it.
"""

from dataclasses import dataclass
from enum import Enum

from model.trace import Assessment, Trace


class Mode(str, Enum):
    """What the policy does on one side. Ordered by strictness: `off`, `score`, `block`."""

    OFF = "off"
    SCORE = "score"
    BLOCK = "block"

    @property
    def strictness(self) -> int:
        """0 for `off`, 1 for `score`, 2 for `block`."""
        return (Mode.OFF, Mode.SCORE, Mode.BLOCK).index(self)


@dataclass(frozen=True)
class Continue:
    """Go on; the first `releasable` response tokens can never be withdrawn any more, except to be redrawn.

    A response that may be redrawn is held back whole, whatever stands here.
    """

    releasable: int


@dataclass(frozen=True)
class Rollback:
    """Withdraw every response token after the first `to`, then refuse."""

    to: int


@dataclass(frozen=True)
class Refuse:
    """Refuse before the first token."""


Decision = Continue | Rollback | Refuse


@dataclass(frozen=True)
class Policy:
    """The rules of acting, as a pure function of a trace.

    Args:
        input: mode of the request side.
        output: mode of the response side.
        request_block: request risk above this is refused, 0 to 1.
        response_block: a smoothed response risk above this is suspicious, 0 to 1.
        onset: a raw response risk above this marks the onset; at most `response_block`.
        patience: suspicious assessments in a row before a rollback, at least 1.
        lookback: tokens before the last clear assessment that a rollback may still withdraw.
        redraw_below: up to this request risk a refusal with which the model begins is drawn again; 0 never is.
    """

    input: Mode
    output: Mode
    request_block: float
    response_block: float
    onset: float
    patience: int = 3
    lookback: int = 8
    redraw_below: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1 or self.lookback < 0:
            raise ValueError(f"patience >= 1 and lookback >= 0, got {self.patience} and {self.lookback}")
        if self.onset > self.response_block:
            raise ValueError(f"onset {self.onset} must not exceed the block threshold {self.response_block}")
        if not 0.0 <= self.redraw_below <= self.request_block:
            raise ValueError(f"redraw_below {self.redraw_below} must be from 0 to request.block, {self.request_block}")

    def decide_request(self, request_risk: float | None) -> Decision:
        """Return `Refuse` where the request side blocks and the risk is over its threshold."""
        blocked = self.input is Mode.BLOCK and request_risk is not None and request_risk > self.request_block
        return Refuse() if blocked else Continue(releasable=0)

    def redraws(self, request_risk: float | None) -> bool:
        """Tell whether the request is so harmless that a refusal with which the model begins is drawn again."""
        return self.input is Mode.BLOCK and request_risk is not None and 0.0 < request_risk <= self.redraw_below

    def is_suspicious(self, assessment: Assessment) -> bool:
        """Tell whether the smoothed response risk is over `response_block`."""
        return assessment.smoothed > self.response_block

    def decide(self, trace: Trace, length: int, *, is_final: bool = False) -> Decision:
        """Return what to do after the newest assessment of a response of `length` tokens.

        Args:
            trace: the assessments so far.
            length: response tokens that exist, assessed or not.
            is_final: the response ends here. One suspicious assessment is then enough, and it must
                cover all `length` tokens.

        Raises:
            ValueError: if a final decision is asked for without an assessment of the whole response.
        """
        if self.output is not Mode.BLOCK:
            return Continue(releasable=length)
        if is_final and trace.position < length:
            raise ValueError(f"a final decision needs an assessment at {length}, the newest is at {trace.position}")
        run = self.num_trailing_suspicious(trace)
        if run >= (1 if is_final else self.patience):
            return Rollback(to=self._rollback_target(trace, run))
        if is_final:
            return Continue(releasable=length)
        return Continue(releasable=self._releasable(trace, run))

    def num_trailing_suspicious(self, trace: Trace) -> int:
        """Return the length of the run of suspicious assessments at the end of `trace`."""
        run = 0
        for assessment in reversed(trace.assessments):
            if not self.is_suspicious(assessment):
                break
            run += 1
        return run

    def _releasable(self, trace: Trace, run: int) -> int:
        last_clear = trace.assessments[-run - 1].position if len(trace.assessments) > run else 0
        return max(0, last_clear - self.lookback)

    def _rollback_target(self, trace: Trace, run: int) -> int:
        """Return the position before the raw risk last rose over `onset`, within the lookback."""
        first = len(trace.assessments) - run  # index of the first suspicious assessment of this run
        while first > 0 and trace.assessments[first - 1].risk > self.onset:
            first -= 1
        onset = trace.assessments[first - 1].position if first > 0 else 0
        return max(onset, self._releasable(trace, run))
