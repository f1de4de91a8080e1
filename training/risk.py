"""Smoothed logits and response risks of many responses at once: the fast twin of `model.trace.Trace`."""

import torch
from torch import Tensor

from model.trace import LOGIT_LIMIT, Trace


def smooth(logits: Tensor, smoothing: float) -> Tensor:
    """Return the moving average of logits along the last dimension, (B, T).

    As in `model.trace`: the first logit stands for itself, each later one enters with weight
    `smoothing`. Later positions never change earlier ones, so padding at the end does no harm.

    Args:
        logits: one logit per response token, (B, T).
        smoothing: weight of the newest logit, in (0, 1].
    """
    step = torch.arange(logits.shape[-1], device=logits.device, dtype=logits.dtype)
    age = step[:, None] - step[None, :]  # (T, T): how many tokens ago
    kernel = torch.where(age >= 0, (1.0 - smoothing) ** age.clamp(min=0), 0.0)
    kernel[:, 1:] *= smoothing
    return logits @ kernel.T  # (B, T)


def request_risks(logits: Tensor) -> Tensor:
    """Return `model.trace.probability` of every logit, (B,) in float64."""
    risks = torch.sigmoid(logits.double().clamp(-LOGIT_LIMIT, LOGIT_LIMIT))
    return risks.masked_fill(~logits.isfinite(), 1.0)


def response_risks(logits: Tensor, lengths: Tensor, smoothing: float, patience: int) -> Tensor:
    """Return `Trace.response_risk(patience)` of every response, (B,) in float64.

    Args:
        logits: raw response logits, padded at the end, (B, T) with T >= 1.
        lengths: response tokens of each, at least 1, (B,).
        smoothing: weight of the newest logit, in (0, 1].
        patience: suspicious assessments in a row before a rollback.
    """
    limited = torch.nan_to_num(logits.double()).clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
    smoothed = smooth(limited, smoothing)  # (B, T)
    highest = smoothed.gather(1, lengths[:, None] - 1)[:, 0]  # (B,): the last one acts alone
    if smoothed.shape[1] >= patience:
        windows = smoothed.unfold(1, patience, 1).min(dim=-1).values  # (B, T - patience + 1)
        ends = torch.arange(patience, smoothed.shape[1] + 1, device=logits.device)
        windows = windows.masked_fill(ends[None, :] > lengths[:, None], -torch.inf)
        highest = torch.maximum(highest, windows.max(dim=1).values)
    risks = torch.sigmoid(highest)
    for row in (~logits.isfinite()).any(dim=1).nonzero()[:, 0].tolist():  # a failed head: rare, and not linear
        risks[row] = _traced(logits[row, : int(lengths[row])].tolist(), smoothing, patience)
    return risks


def _traced(logits: list[float], smoothing: float, patience: int) -> float:
    trace = Trace(smoothing)
    for position, logit in enumerate(logits, start=1):
        trace.add(position, logit)
    return trace.response_risk(patience) or 0.0
