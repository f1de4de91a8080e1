"""The token head at few positions on a CPU: what `model.safety_head` gives, from `head.c`."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from model.safety_head import Passage, RiskHead, TokenHead, extend_each
from server.engine.native import extend_of, risk_logits_of

MOST_ROWS = 64
"""At more, products of torch are faster."""
MOST_OFF = 1e-4
"""Of a logit."""


def quicken(head: TokenHead) -> None:
    """Have a head give its logits at few positions by compiled code, where there is any."""
    for one in (head.request, head.response, *([head.query] if head.query is not None else [])):
        if one.out.weight.device.type == "cpu" and one.hidden is not None and (quick := _quick(one)) is not None:
            one.forward = quick  # type: ignore[method-assign, assignment]  # of one object, not of the class


def _quick(head: RiskHead) -> Callable[[Tensor], Tensor] | None:
    risk_logits = risk_logits_of()
    if risk_logits is None or head.hidden is None:
        return None
    plain = partial(RiskHead.forward, head)  # whatever took its place before
    # Standardisation is linear, and so part of the first layer.
    weight = head.hidden.weight.detach().double() / head.std.double()
    bias = head.hidden.bias.detach().double() - weight @ head.mean.double()
    tensors = (weight.float(), bias.float(), head.out.weight.detach()[0].clone(), head.out.bias.detach().clone())

    with torch.inference_mode():  # where means are far greater than deviations, sums of both lose digits
        noise = torch.randn(8, len(head.mean), generator=torch.Generator().manual_seed(0))
        features = head.mean + head.std * noise
        if not torch.allclose(risk_logits(features, *tensors), plain(features), atol=MOST_OFF, rtol=0.0):
            return None

    def forward(features: Tensor) -> Tensor:
        if len(features) > MOST_ROWS:
            return plain(features)
        return risk_logits(features.contiguous(), *tensors)

    return forward


def extend_rows(passages: Sequence[Passage], states: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Add one token to each of some passages, as `extend_each` does.

    Args:
        passages: N of them, all different.
        states: of the head's layers, (R, D) each.
        rows: which of the R rows is the new token of each passage.

    Returns:
        What the head reads, (N, 2 * S) in float32.
    """
    extend = extend_of(states[0].dtype, states[0].device)
    if extend is None or not all(state.is_contiguous() and state.dtype == states[0].dtype for state in states):
        picked = torch.tensor(rows, device=states[0].device)
        return extend_each(passages, torch.cat([state[picked] for state in states], dim=-1))
    features, totals = extend(states, rows, [passage.total for passage in passages], [len(p) + 1 for p in passages])
    for passage, total in zip(passages, totals, strict=True):
        passage.grow(total)
    return features
