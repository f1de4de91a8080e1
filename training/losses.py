"""Losses of the token head, as functions of tensors. Each returns one value per row.

Rows are averaged by the caller over all rows of a batch, labelled or not, so the loss of a set does
not depend on how it was cut into batches.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import softplus

from training.config import Loss
from training.risk import smooth

NOTHING = -1e4
"""A logit that counts for nothing beside any other, and has a gradient."""


def request_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted binary cross entropy of each request, (B,).

    Args:
        logits: request logits at the last token of each request, (B,).
        labels: 1 for malicious, 0 for benign, (B,); any number where the weight is 0.
        weights: weight of each row; 0 where there is no label, (B,).
    """
    return weights * bce(logits, labels, reduction="none")


def response_loss(
    logits: Tensor, mask: Tensor, labels: Tensor, weights: Tensor, settings: Loss, smoothing: float
) -> Tensor:
    """Return the weighted loss of each response from its one label, (B,).

    Two terms: the softmax-weighted one on smoothed logits, and a plain mean over all positions, so that
    early positions of harmful responses learn something too.

    Args:
        logits: raw response logits, (B, T).
        mask: true where there is a response token of which the label speaks; padding is at the end, (B, T).
        labels: 1 for harmful, 0 for harmless, (B,).
        weights: weight of each row; 0 where there is no label or no response, (B,).
        settings: term weights, tau and first position.
        smoothing: weight of the newest logit in the moving average.
    """
    smoothed = smooth(logits, smoothing)  # (B, T)
    softmax_term = softmax_weighted_loss(
        smoothed,
        _counting(mask, settings.first_position),
        labels,
        tau=settings.tau,
        is_weight_detached=settings.is_weight_detached,
    )
    per_position = bce(logits, labels[:, None].expand_as(logits), reduction="none")  # (B, T)
    mean_term = (per_position * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (B,)
    return weights * (settings.softmax_weight * softmax_term + settings.mean_weight * mean_term)


def query_loss(
    smoothed: Tensor, mask: Tensor, inside: Tensor, labels: Tensor, weights: Tensor, before_weight: float
) -> Tensor:
    """Return the weighted loss of each query, (B,), of which the highest smoothed logit will count.

    As that is what is read, a label is one of the whole (multiple-instance learning): the logarithm of the sum of
    exp(smoothed logit), a soft maximum, must be high over a malicious request, and low over all of a harmless query.
    Before a malicious request it must be low too. After it nothing is asked: the average takes its time to fall, and
    the states may still speak of the request.

    Args:
        smoothed: moving averages of the logits of every token of the query, (B, T).
        mask: true where there is a token; padding is at the end, (B, T).
        inside: true at tokens of the request, (B, T), at least one in each row.
        labels: 1 for malicious, 0 for benign, (B,).
        weights: weight of each row, (B,).
        before_weight: of what stands before a malicious request.
    """
    is_malicious = labels > 0.5  # (B,)
    within = inside & mask & is_malicious[:, None]
    is_before = inside.cumsum(dim=1) == 0  # (B, T)
    without = mask & (is_before | ~is_malicious[:, None])

    def most(chosen: Tensor) -> Tensor:
        return smoothed.masked_fill(~chosen, NOTHING).logsumexp(dim=1)

    missed = torch.where(is_malicious, softplus(-most(within)), 0.0)
    alarmed = softplus(most(without)) * torch.where(is_malicious, before_weight, 1.0)
    return weights * (missed + alarmed)


def softmax_weighted_loss(
    smoothed: Tensor, mask: Tensor, labels: Tensor, *, tau: float, is_weight_detached: bool
) -> Tensor:
    """Return sum over t of w_t * BCE(y, sigmoid(z_t)), with w = softmax(z / tau) over the masked positions, (B,).

    It punishes a confident false alarm anywhere in a harmless response, and leaves the benign opening of
    a harmful one alone.

    Source: Constitutional Classifiers++ (arXiv 2601.04603), section 5. Deviations: z is the moving average
    that the policy acts on, not the mean of 16 logits; the weights are constants unless set otherwise.

    Args:
        smoothed: smoothed logits z, (B, T).
        mask: positions that count; a row without any gives 0, (B, T).
        labels: 1 for harmful, 0 for harmless, (B,).
        tau: temperature in logits, above 0.
        is_weight_detached: let no gradient flow through the weights.
    """
    lowest = torch.finfo(smoothed.dtype).min
    weights = torch.softmax((smoothed / tau).masked_fill(~mask, lowest), dim=1)  # (B, T)
    if is_weight_detached:
        weights = weights.detach()
    per_position = bce(smoothed, labels[:, None].expand_as(smoothed), reduction="none")  # (B, T)
    return (weights * per_position * mask).sum(dim=1)


def _counting(mask: Tensor, first_position: int) -> Tensor:
    """Return the positions from the `first_position`-th on (1 is the first), and always the last one, (B, T)."""
    position = mask.cumsum(dim=1)  # (B, T)
    last = mask.sum(dim=1, keepdim=True)  # (B, 1)
    return mask & ((position >= first_position) | (position == last))
