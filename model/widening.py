"""Products in bfloat16 on a processor that has none: torch takes several times as long for them there as for floats."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

FEW = 4
"""Rows for which it takes as long to widen the weights as to multiply them as they are."""


class WidenedLinear(nn.Linear):
    """A linear layer on a CPU that multiplies in float32 what others do in bfloat16, by its weights or by autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the product (..., out) of an input (..., in)."""
        casts = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        is_narrow = casts or (input.dtype == self.weight.dtype == torch.bfloat16)
        if not is_narrow or input.device.type != "cpu" or input.numel() <= FEW * self.in_features:
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call, no-any-return]  # untyped there


def widen(model: nn.Module) -> None:
    """Have the linear layers of a model on the CPU be `WidenedLinear`, where the processor has no products in bfloat16.

    What is multiplied is in bfloat16 as before, and so is the product; sums are of floats in both. Weights stay.
    """
    if has_products():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = WidenedLinear


@cache
def has_products() -> bool:
    """Tell whether torch has its own products in bfloat16 for this processor."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped there
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Product(torch.autograd.Function):
    """The product; for its gradients it keeps its input in bfloat16, and the weight as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight)
        ctx.dtype_of_x = x.dtype
        ctx.dtype_of_bias = None if bias is None else bias.dtype
        with torch.autocast("cpu", enabled=False):
            return linear(_wide(x), _wide(weight), None if bias is None else _wide(bias)).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = None, None, None
        with torch.autocast("cpu", enabled=False):
            gradient = gradient.float()
            if ctx.needs_input_grad[0]:
                of_x = (gradient @ _wide(weight)).to(ctx.dtype_of_x)
            rows = gradient.flatten(end_dim=-2)
            if ctx.needs_input_grad[1]:
                of_weight = (rows.T @ _wide(x).flatten(end_dim=-2)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                of_bias = rows.sum(0).to(ctx.dtype_of_bias)
        return of_x, of_weight, of_bias


def _wide(number: Tensor) -> Tensor:
    """Return what bfloat16 leaves of numbers, as floats."""
    return number.bfloat16().float()
