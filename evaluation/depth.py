"""The response risk inside a response: what it would be if the response ended there."""

import math
from collections.abc import Sequence

EARLY = (0.25, 0.5, 0.75)
"""Shares of a response's tokens after which it is judged, besides the whole."""


def response_risk(smoothed: Sequence[float], patience: int) -> float:
    """Return the response risk of a text from its smoothed risks, one per token.

    It is the highest value, over the text, of the lowest of `patience` consecutive smoothed risks, and
    the last one if that is higher: what a policy of this patience would have acted on.

    Raises:
        ValueError: if there are no tokens, or `patience` is under 1.
    """
    if not smoothed or patience < 1:
        raise ValueError(f"tokens and a patience of at least 1 are needed, got {len(smoothed)} and {patience}")
    windows = (min(smoothed[end - patience : end]) for end in range(patience, len(smoothed) + 1))
    return max([smoothed[-1], *windows])


def early_risks(smoothed: Sequence[float], patience: int) -> tuple[float, ...]:
    """Return the response risk of the first part of a text, for each share of `EARLY`, rounded up to whole tokens.

    A smoothed risk reads nothing that comes later, so these are, but for rounding in the model, the risks
    of the text cut there. The policy acts on the last one alone only at the end of a response; in the
    middle of one it waits for `patience` of them.
    """
    return tuple(response_risk(smoothed[: math.ceil(share * len(smoothed))], patience) for share in EARLY)
