"""The assessments of one sequence, in order. Pure Python: no tensors, no I/O, no clock.

Smoothing follows Constitutional Classifiers++ (arXiv 2601.04603): an exponential moving average of
the logits. Deviation: the weight of a new logit depends on how many tokens it covers, so that the
smoothed risk means the same under every schedule.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

LOGIT_LIMIT = 20.0
"""Logits are clamped here, so that one extreme value cannot outweigh all that follow."""


def probability(logit: float) -> float:
    """Return the logistic function of `logit`, in (0, 1); NaN and infinities count as certain harm (1.0)."""
    if not math.isfinite(logit):
        return 1.0
    clamped = max(-LOGIT_LIMIT, min(LOGIT_LIMIT, logit))
    return 1.0 / (1.0 + math.exp(-clamped))


def logit_of(risk: float) -> float:
    """Return the logit of a risk in (0, 1), such as a threshold: what `probability` makes that risk of."""
    return math.log(risk) - math.log1p(-risk)


def response_risk(smoothed: Sequence[float], patience: int) -> float:
    """Return what a policy of this patience would have acted on, from the smoothed risks of one sequence.

    It is the highest value, over the sequence, of the lowest of `patience` consecutive smoothed
    risks, and the last one if that is higher.

    Raises:
        ValueError: if there are no risks, or `patience` is under 1.
    """
    if not smoothed or patience < 1:
        raise ValueError(f"risks and a patience of at least 1 are needed, got {len(smoothed)} and {patience}")
    windows = (min(smoothed[end - patience : end]) for end in range(patience, len(smoothed) + 1))
    return max([smoothed[-1], *windows])


class Highest:
    """The highest of the smoothed logits of a run of tokens, every one of which is read.

    Args:
        smoothing: as that of `Trace`.
    """

    def __init__(self, smoothing: float) -> None:
        self.logit: float | None = None
        """None before the first; NaN once a reading has failed, which counts as certain harm."""
        self._smoothing = smoothing
        self._smoothed: float | None = None

    def add(self, logits: Iterable[float]) -> None:
        """Add the logits of the next tokens."""
        for logit in logits:
            limited = max(-LOGIT_LIMIT, min(LOGIT_LIMIT, logit))
            before = limited if self._smoothed is None else self._smoothed
            self._smoothed = before + self._smoothing * (limited - before)
            self.raise_to(self._smoothed if math.isfinite(logit) else math.nan)

    def raise_to(self, logit: float) -> None:
        """Take another reading of the same text in, which may only raise it."""
        if not math.isfinite(logit):
            self.logit = math.nan
        elif self.logit is None or logit > self.logit:
            self.logit = logit


@dataclass(frozen=True, slots=True)
class Assessment:
    """One evaluation of the signal: it covers the request and the first `position` response tokens."""

    position: int
    risk: float
    smoothed_logit: float
    """The moving average up to here; a failed evaluation leaves it as it was, NaN if there was none."""
    is_failed: bool = False
    """The head gave no finite number: suspicious whatever came before."""

    @property
    def smoothed(self) -> float:
        """The smoothed response risk, 0 to 1; 1 where the head failed."""
        return 1.0 if self.is_failed else probability(self.smoothed_logit)


@dataclass
class Trace:
    """The request risk and every assessment of one response.

    Args:
        smoothing: weight of the newest token's logit in the moving average, in (0, 1]; 1 does not smooth.
    """

    smoothing: float
    request_risk: float | None = None
    assessments: list[Assessment] = field(default_factory=list)
    is_request_failed: bool = False
    """The head gave no finite number for the request, which counts as certain harm."""

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothing <= 1.0:
            raise ValueError(f"smoothing must be in (0, 1], got {self.smoothing}")

    @property
    def position(self) -> int:
        """How many response tokens the newest assessment covers."""
        return self.assessments[-1].position if self.assessments else 0

    @property
    def num_failures(self) -> int:
        """Assessments on which the head failed, that of the request included."""
        return self.is_request_failed + sum(assessment.is_failed for assessment in self.assessments)

    def read_request(self, logit: float) -> None:
        """Note the assessment of the request."""
        self.request_risk = probability(logit)
        self.is_request_failed = not math.isfinite(logit)

    def add(self, position: int, logit: float) -> Assessment:
        """Append the assessment of the first `position` tokens and return it.

        Raises:
            ValueError: if `position` does not lie after the newest assessment.
        """
        if position <= self.position:
            raise ValueError(f"assessments move forward: {position} is not after {self.position}")
        last = next((found for found in reversed(self.assessments) if not found.is_failed), None)
        if not math.isfinite(logit):
            before = last.smoothed_logit if last is not None else math.nan
            assessment = Assessment(position, 1.0, before, is_failed=True)
        else:
            smoothed = max(-LOGIT_LIMIT, min(LOGIT_LIMIT, logit))
            if last is not None:
                kept = (1.0 - self.smoothing) ** (position - last.position)
                smoothed = kept * last.smoothed_logit + (1.0 - kept) * smoothed
            assessment = Assessment(position, probability(logit), smoothed)
        self.assessments.append(assessment)
        return assessment

    def response_risk(self, patience: int) -> float | None:
        """Return what a policy of this patience would have acted on, or None without assessments."""
        smoothed = [assessment.smoothed for assessment in self.assessments]
        return response_risk(smoothed, patience) if smoothed else None
