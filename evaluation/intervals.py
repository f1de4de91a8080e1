"""Estimates with their uncertainty. An estimate from no samples is an error, never zero."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n = {self.n})"


def wilson(hits: int, n: int) -> Estimate:
    """Return the share `hits / n` with Wilson's score interval (Wilson 1927).

    Raises:
        ValueError: if there are no samples.
    """
    if n == 0:
        raise ValueError("a share of no samples is undefined")
    share = hits / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return Estimate(share, low, high, n)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean with a bootstrap interval; of values that are all 0 or 1, with Wilson's.

    Raises:
        ValueError: if there are no samples, or one alone, whose spread is unknown.
    """
    if set(values) <= {0.0, 1.0}:
        return wilson(int(sum(values)), len(values))
    return resampled(values, lambda some: some.mean(axis=1))


def resampled(
    samples: ArrayLike,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return a statistic of the samples with a percentile bootstrap interval over them.

    Args:
        samples: a number each, or a row of numbers each.
        statistic: maps resamples `(B, N)` or `(B, N, numbers)` to one value each, `(B,)`.
        resamples: how many are drawn.
        seed: of the draws.

    Raises:
        ValueError: if there are no samples, or one alone, whose spread is unknown.
    """
    found = np.asarray(samples, dtype=np.float64)
    n = len(found)
    if n < 2:
        raise ValueError(f"{'one sample has' if n else 'no samples have'} no interval")
    drawn = found[np.random.default_rng(seed).integers(0, n, (resamples, n))]  # (B, N, ...)
    low, high = np.quantile(statistic(drawn), (0.025, 0.975))
    return Estimate(float(statistic(found[None])[0]), float(low), float(high), n)


def bootstrap(
    labels: Sequence[int],
    scores: Sequence[float],
    metric: Callable[[NDArray[np.int_], NDArray[np.float64]], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return `metric(labels, scores)` with a percentile bootstrap interval over the samples.

    Resamples that hold one class only are drawn again.

    Raises:
        ValueError: if a class is missing.
    """
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if len(set(y.tolist())) < 2:
        raise ValueError(f"both classes are needed, got labels {sorted(set(y.tolist()))} over {len(y)} samples")
    rng = np.random.default_rng(seed)
    values: list[float] = []
    while len(values) < resamples:
        picked = rng.integers(0, len(y), len(y))
        if 0 < y[picked].sum() < len(y):
            values.append(metric(y[picked], s[picked]))
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(float(metric(y, s)), float(low), float(high), len(y))
