"""Objectives on the response tokens of a language model, as functions of tensors.

Every one is a weighted sum over tokens, so a step gives the same gradient however it is cut into batches.
Positions count from the first response token, whatever padding or prompt stands before it.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, softplus

IGNORED = -100
"""Label of a token that is not learned: prompt, harmful prefix, padding."""


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log pi(y_t | x, y_<t) of every token, in float32, (N,).

    Args:
        logits: next-token logits of what stands before each token, (N, V).
        tokens: the tokens themselves, (N,).
    """
    return -cross_entropy(logits.float(), tokens, reduction="none")


def divergences(logits: Tensor, reference: Tensor) -> Tensor:
    """Return KL(pi_reference || pi_theta) of every next token, in float32, (N,).

    Its gradient is what that of the cross entropy is on average over draws from the reference, without their noise.
    Deviation from Qi et al. 2024 (arXiv 2406.05946), section 3, where anchors are tokens that the model drew.

    Args:
        logits: next-token logits of the model, (N, V).
        reference: those of the reference, which gets no gradient, (N, V).
    """
    learned, expected = logits.float().log_softmax(dim=-1), reference.detach().float().log_softmax(dim=-1)
    return kl_div(learned, expected, reduction="none", log_target=True).sum(dim=-1)


def positions(labels: Tensor) -> Tensor:
    """Return the position t of every response token, from 1, and 0 elsewhere, (B, T).

    Args:
        labels: `IGNORED` where not learned; the learned tokens of a row stand together, (B, T).
    """
    is_learned = labels != IGNORED
    return is_learned.cumsum(dim=1) * is_learned


def recovery_depth(longest: int, generator: torch.Generator, *, probability: float = 0.5, deepest: int = 100) -> int:
    """Draw k, the number of harmful tokens before the refusal.

    k = 0 with probability 1 - p, else uniform on 1..min(C, |h|).
    Source: Qi et al. 2024 (arXiv 2406.05946), section 3, eq. 2, P_k. Deviation: the paper asks for C <= |h|; a
    shorter harmful answer caps its own depth.

    Args:
        longest: tokens of the harmful answer, |h|; 0 always gives 0.
        generator: the draw.
        probability: p.
        deepest: C.
    """
    if longest < 1 or torch.rand((), generator=generator).item() >= probability:
        return 0
    return int(torch.randint(1, min(deepest, longest) + 1, (), generator=generator).item())


def share_weights(counts: Tensor, shares: Tensor) -> Tensor:
    """Return the weight of one token of each part, so that part i's tokens weigh shares[i] together, (P,).

    With alpha for the recovery examples and 1 - alpha for the anchors, the sum of weights times negative
    log-likelihoods is eq. 2 of Qi et al. 2024 (arXiv 2406.05946), section 3, each expectation being the mean over
    the part's response tokens. Deviations: the paper does not say whether a row or a token is the unit; the
    authors' code pools all tokens, which lets the lengths set the ratio. A part without tokens weighs nothing, and
    the others are not scaled up for it.

    Args:
        counts: response tokens of each part in the step, (P,).
        shares: share of each part in the loss, (P,).
    """
    return torch.where(counts > 0, shares / counts.clamp(min=1), torch.zeros_like(shares))


def betas(
    position: Tensor, *, first: float = 0.5, early: float = 2.0, rest: float = 0.1, last_early: int = 5
) -> Tensor:
    """Return beta_t: `first` at t = 1, `early` up to t = `last_early`, `rest` after it; in the shape of `position`.

    Source: Qi et al. 2024 (arXiv 2406.05946), section 4: 0.5, 2 for 2 <= t <= 5, 0.1.

    Args:
        position: t of every token, from 1; what 0 gives is of no use.
        first: beta_1.
        early: beta_t of the tokens after it.
        rest: beta_t of all later tokens.
        last_early: the last t that has `early`.
    """
    beta = torch.where(position <= last_early, early, rest)
    return torch.where(position <= 1, first, beta)


def constraint_weights(logprobs: Tensor, reference: Tensor, beta: Tensor) -> Tensor:
    """Return w_t = 2 sigmoid(beta_t (log pi_aligned - log pi_theta)), between 0 and 2, in the shape of `logprobs`.

    It is what multiplies the gradient of the cross entropy in `constrained_loss`: 1 at the start, towards 0 where
    the model has moved up from the reference. Source: Qi et al. 2024 (arXiv 2406.05946), section 4. Deviation from
    the authors' code: no floor of 0.001, which would let the constraint leak.
    """
    return 2 * torch.sigmoid(beta * (reference - logprobs))


def constrained_loss(logprobs: Tensor, reference: Tensor, beta: Tensor) -> Tensor:
    """Return -(2 / beta_t) log sigmoid(beta_t log(pi_theta / pi_aligned)) for every token, in its shape.

    Source: Qi et al. 2024 (arXiv 2406.05946), section 4, eq. 3, before the sum over t. Its gradient is
    `constraint_weights` times that of the cross entropy. beta to 0 gives the cross entropy but for a constant.

    Args:
        logprobs: log pi_theta(y_t | x, y_<t).
        reference: log pi_aligned(y_t | x, y_<t) of the model that training starts from.
        beta: strength at every token, above 0.
    """
    return 2 / beta * softplus(beta * (reference - logprobs))
