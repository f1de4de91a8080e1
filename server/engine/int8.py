"""Products with weights in 8 bits: half the bytes of bfloat16 to read, and fewer instructions for each.

Each output has one scale for each block of inputs, and levels from -127 to 127 around zero. What is multiplied with
them is rounded likewise, as it comes. `multiply_int8.c` computes the product.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.engine.compiled import operation
from server.engine.native import multiply_int8_of
from server.engine.tape import dense

OUTPUTS = 32
"""Of a block; as in `multiply_int8.c`, and the next three too."""
INPUTS = 64
WEIGHT_BYTES = OUTPUTS * (INPUTS + 4)
"""Of a block: levels, and a scale for each output."""
READ_BYTES = INPUTS + 8
"""Of what is read in a block: levels, their scale, and where sums start."""


def levels_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight (out, in) in 8 bits, (out, blocks, INPUTS) with zeros beyond `in`, and scales (out, blocks)."""
    missing = -weight.shape[1] % INPUTS
    blocks = pad(weight.float(), (0, missing)).view(len(weight), -1, INPUTS)
    scales = blocks.abs().amax(-1) / 127
    levels = (blocks / scales.where(scales > 0, 1)[..., None]).round()
    return levels.to(torch.int8), scales


def in_levels(weight: Tensor) -> Tensor:
    """Return a weight (out, in) as `multiply_int8.c` reads it, (out / OUTPUTS, blocks, WEIGHT_BYTES)."""
    levels, scales = levels_of(weight)
    num_blocks = scales.shape[1]
    fours = (levels.short() + 128).to(torch.uint8).view(-1, OUTPUTS, num_blocks, INPUTS // 4, 4).permute(0, 2, 3, 1, 4)
    of_outputs = scales.view(-1, OUTPUTS, num_blocks).transpose(1, 2).contiguous()
    return torch.cat([fours.flatten(2), of_outputs.view(torch.uint8)], dim=-1)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    multiply = multiply_int8_of()
    assert multiply is not None
    rows = dense(x).view(-1, x.shape[-1])
    found = _shape(x, weight, bias)
    read = torch.empty(len(rows), weight.shape[1], READ_BYTES, dtype=torch.uint8)
    multiply(rows, weight, bias, found.view(len(rows), -1), read)
    return found


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return something of the shape of the product."""
    return x.new_empty(*x.shape[:-1], len(weight) * OUTPUTS)


operation("multiply_int8(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _multiply, _shape, "CPU")
