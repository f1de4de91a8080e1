"""Weights of linear layers in the order in which they are read, and those side by side that read the same thing.

Where there is a compiler, and the processor one that `multiply.c` is written for, products are those of `multiply.c`,
elsewhere on a CPU those of oneDNN: both read packed weights, faster than plain ones. Weights in 8 bits
(`server/engine/int8.py`) are faster still, for whoever asks for them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.widening import WidenedLinear, has_products
from server.engine.compiled import operation
from server.engine.int8 import in_levels
from server.engine.native import multiply_of
from server.engine.tape import dense

BLOCK = 32
"""Outputs that are summed together."""


class Product:
    """One product in the place of several that read the same thing, such as queries, keys and values of a layer.

    Args:
        layers: linear layers on a GPU, or in bfloat16 on the CPU; all of them have a bias, or none.
        is_int8: their weights are rounded to 8 bits; on a CPU that can multiply such.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, is_int8: bool = False) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self._num_layers = len(layers)
        weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.data for layer in layers])
        if weight.device.type != "cpu":
            self._compute, self.weight = nn.functional.linear, weight
        elif is_int8 or _is_in_pairs(weight):
            self._compute = torch.ops.ballast.multiply_int8 if is_int8 else torch.ops.ballast.multiply
            if num_missing := -len(weight) % BLOCK:
                self.sizes.append(num_missing)  # of no layer
                weight = torch.cat([weight, weight.new_zeros(num_missing, weight.shape[1])])
            self.weight = in_levels(weight) if is_int8 else in_blocks(weight)
            if self.bias is not None:
                self.bias = torch.cat([self.bias, weight.new_zeros(num_missing)])
        else:
            self._compute = torch.ops.ballast.linear
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._read: Tensor | None = None
        self._parts: Sequence[Tensor] = ()
        self._num_left = 0

    def part(self, number: int, x: Tensor) -> Tensor:
        """Return the product of one of the layers with x (..., in); the first that asks has all of them computed."""
        if self._read is not x:
            found: Tensor = self._compute(x, self.weight, self.bias)
            self._read, self._parts, self._num_left = x, torch.split(found, self.sizes, dim=-1), self._num_layers
        part, self._num_left = self._parts[number], self._num_left - 1
        if not self._num_left:  # all have had theirs: hold on to nothing
            self._read, self._parts = None, ()
        return part


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed; the plain weight is gone, unless others have it too.

    Args:
        plain: the layer.
        product: computes it.
        number: which of the layers of the product it is.
    """

    def __init__(self, plain: nn.Linear, product: Product, number: int) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.product, self.number = product, number

    def forward(self, x: Tensor) -> Tensor:
        """Return the product (..., out) of x (..., in)."""
        return self.product.part(self.number, x)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return something of the shape of the product, for the compiler."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# The compiler takes oneDNN's own operation with constant weights alone.
operation("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _shape, "MkldnnCPU")


def in_blocks(weight: Tensor) -> Tensor:
    """Return a weight (out, in) as `multiply.c` reads it, (out / BLOCK, in / 2, BLOCK, 2)."""
    return weight.reshape(-1, BLOCK, weight.shape[1] // 2, 2).transpose(1, 2).contiguous()


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    multiply = multiply_of()
    assert multiply is not None
    rows = dense(x).view(-1, x.shape[-1])
    found = _shape_of_blocks(x, weight, bias)
    multiply(rows, weight, bias, found.view(len(rows), -1))
    return found


def _shape_of_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return something of the shape of the product."""
    return x.new_empty(*x.shape[:-1], len(weight) * BLOCK)


operation("multiply(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _multiply, _shape_of_blocks, "CPU")


def pack(model: PreTrainedModel, run: Callable[[], object], *, is_int8: bool = False) -> int:
    """Pack every plain linear layer of a model, in place, and return how many products are left of them.

    On a GPU these are the layers that read the same thing; on a CPU, models that are not in bfloat16, and weights that
    nothing here can pack, are left as they are.

    Args:
        model: the model.
        run: runs it once, which shows what reads the same thing.
        is_int8: round weights to 8 bits; for a model in bfloat16 on a CPU that can multiply such.
    """
    is_gpu = model.device.type == "cuda"
    found = {
        child: (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
        and type(child) in (nn.Linear, WidenedLinear)
        and (is_gpu or _is_packable(child, is_int8=is_int8))
    }
    if not found:
        return 0
    groups = [group for group in _siblings(found, run) if len(group) > 1 or not is_gpu]
    with torch.inference_mode():
        for group in groups:
            product = Product(group, is_int8=is_int8)
            for number, layer in enumerate(group):
                parent, name = found[layer]
                setattr(parent, name, PackedLinear(layer, product, number))
    return len(groups)


def _is_packable(layer: nn.Linear, *, is_int8: bool) -> bool:
    """Tell whether there is a product with the packed weight of a layer on a CPU."""
    if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.bfloat16:
        return False
    return is_int8 or _is_in_pairs(layer.weight) or has_products()


def _is_in_pairs(weight: Tensor) -> bool:
    """Tell whether `multiply.c` takes a weight."""
    return multiply_of() is not None and weight.shape[1] % 2 == 0


def _siblings(layers: Mapping[nn.Linear, tuple[nn.Module, str]], run: Callable[[], object]) -> list[list[nn.Linear]]:
    """Return the layers, those together that stand in one module and read one tensor, in the order of their reading."""
    read: dict[nn.Linear, Tensor] = {}

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(layer, nn.Linear) and args:
            read.setdefault(layer, args[0])  # kept until the end, so that no other has its place

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[tuple[int, int, bool], list[nn.Linear]] = {}
    for layer, x in read.items():
        groups.setdefault((id(layers[layer][0]), id(x), layer.bias is None), []).append(layer)
    return [*groups.values(), *([layer] for layer in layers if layer not in read)]
