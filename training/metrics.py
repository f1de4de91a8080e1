"""Thresholds and quality numbers of risks against labels. Pure functions of arrays."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Array = NDArray[np.float64]
"""One value per row, (N,)."""


@dataclass(frozen=True)
class Rate:
    """A share with its count and 95 % Wilson interval."""

    value: float
    low: float
    high: float
    hits: int
    n: int


@dataclass(frozen=True)
class Quality:
    """How one side's risk does on one source."""

    num_benign: int
    num_harmful: int
    auroc: float | None
    """None, like `average_precision`, where the source has one class only."""
    average_precision: float | None
    f1_at_flag: float | None
    """None where the source has no harmful row."""
    false_positives_at_block: Rate | None
    recall_at_block: Rate | None


@dataclass(frozen=True)
class Bin:
    """Rows of like risk, and the share of them that is harmful."""

    low: float
    high: float
    n: int
    mean_risk: float
    share_harmful: float


def wilson(hits: int, n: int, z: float = 1.959964) -> Rate:
    """Return the share `hits / n` with its Wilson score interval.

    Raises:
        ValueError: if n is 0.
    """
    if n < 1:
        raise ValueError(f"a share needs at least one row, got n = {n}")
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Rate(share, max(0.0, centre - half), min(1.0, centre + half), hits, n)


def block_threshold(benign: Array, false_positives: float) -> float:
    """Return the lowest threshold that at most this share of benign risks exceeds.

    Raises:
        ValueError: if there is no benign risk.
    """
    if not len(benign):
        raise ValueError("a block threshold needs at least one benign row")
    allowed = math.floor(false_positives * len(benign) + 1e-9)
    return float(np.sort(benign)[::-1][min(allowed, len(benign) - 1)])


def flag_threshold(risks: Array, labels: Array, weights: Array) -> float:
    """Return the threshold with the best weighted F1, halfway between two neighbouring risks.

    Args:
        risks: in (0, 1), (N,).
        labels: 1 for harmful, (N,).
        weights: weight of each row, (N,).

    Raises:
        ValueError: if no harmful row has weight.
    """
    harmful = weights * labels
    if harmful.sum() <= 0:
        raise ValueError("a flag threshold needs at least one harmful row with weight")
    order = np.argsort(-risks, kind="stable")
    hits, flagged = np.cumsum(harmful[order]), np.cumsum(weights[order])
    f1 = 2 * hits / (flagged + harmful.sum())
    descending = risks[order]
    is_border = np.append(descending[:-1] > descending[1:], True)  # equal risks are flagged together
    best = int(np.argmax(np.where(is_border, f1, -1.0)))
    below = descending[best + 1] if best + 1 < len(descending) else 0.0
    return float((descending[best] + below) / 2)


def balanced_weights(groups: NDArray[np.str_], group_weights: dict[str, float]) -> Array:
    """Return row weights that give each group its weight in total, however many rows it has, (N,)."""
    names, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    shares = np.array([group_weights[str(name)] for name in names]) / counts
    return np.asarray(shares[inverse], dtype=np.float64)


def quality(risks: Array, labels: Array, *, block: float, flag: float) -> Quality:
    """Return the numbers of one source, (N,) each, N >= 1."""
    benign, harmful = risks[labels == 0], risks[labels == 1]
    has_both = bool(len(benign) and len(harmful))
    flagged = int((harmful > flag).sum()), int((benign > flag).sum())
    return Quality(
        num_benign=len(benign),
        num_harmful=len(harmful),
        auroc=float(roc_auc_score(labels, risks)) if has_both else None,
        average_precision=float(average_precision_score(labels, risks)) if has_both else None,
        f1_at_flag=2 * flagged[0] / (sum(flagged) + len(harmful)) if len(harmful) else None,
        false_positives_at_block=wilson(int((benign > block).sum()), len(benign)) if len(benign) else None,
        recall_at_block=wilson(int((harmful > block).sum()), len(harmful)) if len(harmful) else None,
    )


def reliability(risks: Array, labels: Array, num_bins: int = 10) -> list[Bin]:
    """Return bins of equal width; empty ones are left out."""
    edges = np.linspace(0, 1, num_bins + 1)
    place = np.clip(np.digitize(risks, edges) - 1, 0, num_bins - 1)
    return [
        Bin(
            float(edges[index]),
            float(edges[index + 1]),
            int((place == index).sum()),
            float(risks[place == index].mean()),
            float(labels[place == index].mean()),
        )
        for index in range(num_bins)
        if (place == index).any()
    ]
