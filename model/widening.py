"""Products in bfloat16 on a processor that has none: torch takes several times as long for them there as for floats."""

from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FEW = 4
"""Rows for which it takes longer to widen the weights than to multiply them as they are."""


def widen(model: nn.Module) -> None:
    """Have the linear layers of a model multiply in float32 what they would in bfloat16, on a CPU that is quicker so.

    Sums are those of floats in both, and results are rounded to bfloat16 as before. Weights stay as they are. Where
    the processor has products in bfloat16, nothing changes.
    """
    if _has_products():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_product, module)  # type: ignore[method-assign]  # as others do, peft on top of it


@cache
def _has_products() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped there
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    """Return the product (..., out) of x (..., in)."""
    casts = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    is_narrow = x.device.type == "cpu" and (casts or x.dtype == torch.bfloat16)
    if not is_narrow or x.numel() <= FEW * layer.in_features:
        return nn.Linear.forward(layer, x)
    with torch.autocast("cpu", enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return linear(x.float(), layer.weight.float(), bias).bfloat16()
