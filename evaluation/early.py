"""The response risk inside a response: what it would be if the response ended there."""

import math
from collections.abc import Sequence

from model.trace import response_risk

EARLY = (0.25, 0.5, 0.75)
"""Shares of a response's tokens after which it is judged, besides the whole."""


def early_risks(smoothed: Sequence[float], patience: int) -> tuple[float, ...]:
    """Return the response risk of the first part of a text, for each share of `EARLY`, rounded up to whole tokens.

    A smoothed risk reads nothing that comes later, so these are, but for rounding in the model, the risks
    of the text cut there. The policy acts on the last one alone only at the end of a response; in the
    middle of one it waits for `patience` of them.
    """
    return tuple(response_risk(smoothed[: math.ceil(share * len(smoothed))], patience) for share in EARLY)
