"""Weights of linear layers in the order in which oneDNN reads them.

On CPUs with bfloat16 products of few rows are faster by half, and the same.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.compiled import operation


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; the plain weight is gone, unless others have it too.

    Args:
        plain: the layer, in bfloat16 on the CPU.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.data)
        self.bias = plain.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the product (..., out) of x (..., in)."""
        found: Tensor = torch.ops.ballast.linear(x, self.weight, self.bias)
        return found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return something of the shape of the product, for the compiler."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# The compiler takes oneDNN's own operation with constant weights alone.
operation("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _shape, "MkldnnCPU")


def pack(model: PreTrainedModel) -> int:
    """Pack every plain linear layer of a model, in place, and return how many they were.

    Models that are not in bfloat16 on a CPU that knows it are left as they are.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return 0
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped there
        return 0
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16
    ]
    with torch.inference_mode():
        for parent, name, child in found:
            setattr(parent, name, PackedLinear(child))
    return len(found)
