"""Attention for rows that read by lists of slots, on a GPU: what `attend.c` does on a CPU. In Triton.

The keys of a list are read in pieces, as in FlashAttention-2 (arXiv 2307.08691), and where there are few rows a list is
shared out among several programs, whose results are joined, as in Flash-Decoding.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 64
"""Slots that are read at a time."""
PROGRAMS = 256
"""That keep a GPU busy."""
MOST_SHARES = 16
"""Programs among which a list is shared out."""


@triton.jit
def _attend(
    queries, keys, values, output, found_by, most_by, total_by, rows, slots, offsets, scaling, row_stride, head_stride,
    store_stride_k, store_stride_v, out_row_stride, NUM_GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    G: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, PIECE: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Read one share of the list of one row, for all query heads of one key head."""
    number, head, share = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, stop = tl.load(offsets + number), tl.load(offsets + number + 1)
    each = tl.cdiv(tl.cdiv(stop - first, SHARES), PIECE) * PIECE
    start = first + share * each
    stop = tl.minimum(start + each, stop)
    row = tl.load(rows + number)
    g, d, dv = tl.arange(0, G), tl.arange(0, DP), tl.arange(0, DVP)
    heads = head * NUM_GROUPS + g
    there = g < NUM_GROUPS
    query = tl.load(
        queries + row * row_stride + heads[:, None] * head_stride + d[None, :],
        mask=there[:, None] & (d < D)[None, :],
        other=0.0,
    )
    most = tl.full((G,), -float("inf"), tl.float32)
    total = tl.zeros((G,), tl.float32)
    found = tl.zeros((G, DVP), tl.float32)
    for at in range(start, stop, PIECE):
        places = at + tl.arange(0, PIECE)
        is_read = places < stop
        slot = tl.load(slots + places, mask=is_read, other=0)
        key = tl.load(
            keys + head * store_stride_k + slot[None, :] * D + d[:, None],
            mask=is_read[None, :] & (d < D)[:, None],
            other=0.0,
        )
        scores = tl.dot(query, key, input_precision="ieee") * scaling
        scores = tl.where(is_read[None, :], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - highest[:, None])
        faded = tl.exp(most - highest)
        value = tl.load(
            values + head * store_stride_v + slot[:, None] * DV + dv[None, :],
            mask=is_read[:, None] & (dv < DV)[None, :],
            other=0.0,
        )
        found = found * faded[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        total = total * faded + tl.sum(weights, 1)
        most = highest
    if SHARES == 1:
        found = found / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            output + row * out_row_stride + heads[:, None] * DV + dv[None, :],
            found.to(output.dtype.element_ty),
            mask=there[:, None] & (dv < DV)[None, :],
        )
    else:
        num_heads = tl.num_programs(1) * NUM_GROUPS
        place = (number * num_heads + heads) * SHARES + share
        tl.store(most_by + place, most, mask=there)
        tl.store(total_by + place, total, mask=there)
        tl.store(found_by + place[:, None] * DV + dv[None, :], found, mask=there[:, None] & (dv < DV)[None, :])


@triton.jit
def _join(
    found_by, most_by, total_by, output, rows, out_row_stride, DV: tl.constexpr, DVP: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """Join what the shares of the list of one row found, for one head."""
    number, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = (number * tl.num_programs(1) + head) * SHARES + tl.arange(0, SHARES)
    dv = tl.arange(0, DVP)
    most = tl.load(most_by + place)
    highest = tl.max(most, 0)
    weights = tl.exp(most - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(weights * tl.load(total_by + place), 0)
    found = tl.load(found_by + place[:, None] * DV + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
    found = tl.sum(found * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    row = tl.load(rows + number)
    tl.store(output + row * out_row_stride + head * DV + dv, found.to(output.dtype.element_ty), mask=dv < DV)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    rows: Tensor,
    slots: Tensor,
    offsets: Tensor,
    scaling: float,
) -> None:
    """Write what some rows read; a `server.engine.native.Attend`. A row that reads nothing gets zeros.

    Args:
        queries: of all rows, (R, H, D); the last dimension side by side.
        keys: the store, (H', slots, D).
        values: the store, (H', slots, D').
        output: of all rows, (R, H, D').
        rows: the N that read.
        slots: what they read, one list after the other.
        offsets: where each list begins, and the end of the last one, (N + 1,).
        scaling: of the scores.
    """
    (_, num_heads, size), num_key_heads, value_size = queries.shape, len(keys), values.shape[-1]
    groups = num_heads // num_key_heads
    shares = 1
    while shares < MOST_SHARES and 2 * shares * len(rows) * num_key_heads <= PROGRAMS:
        shares *= 2
    is_shared = shares > 1
    parts = len(rows) * num_heads * shares if is_shared else 0
    found, most, total = (
        torch.empty(parts * width, dtype=torch.float32, device=queries.device) for width in (value_size, 1, 1)
    )
    padded = max(16, triton.next_power_of_2(value_size))
    with torch.cuda.device(queries.device) if queries.is_cuda else nullcontext():
        _attend[(len(rows), num_key_heads, shares)](
            queries, keys, values, output, found, most, total, rows, slots, offsets, scaling,
            queries.stride(0), queries.stride(1), keys.stride(0), values.stride(0), output.stride(0),
            groups, size, value_size, max(16, triton.next_power_of_2(groups)), max(16, triton.next_power_of_2(size)),
            padded, PIECE, shares,
        )  # fmt: skip
        if is_shared:
            place = found, most, total, output, rows, output.stride(0)
            _join[(len(rows), num_heads)](*place, value_size, padded, shares)


@triton.jit
def _keep(
    key, value, keys, values, slots, key_head, key_row, value_head, value_row, store_stride_k, store_stride_v,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """Copy the key and the value of one row, of one key head, to its slot."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    one = tl.load(key + head * key_head + row * key_row + d, mask=d < D)
    tl.store(keys + head * store_stride_k + slot * D + d, one, mask=d < D)
    other = tl.load(value + head * value_head + row * value_row + dv, mask=dv < DV)
    tl.store(values + head * store_stride_v + slot * DV + dv, other, mask=dv < DV)


def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Copy the keys and values of some rows, (H', R, D), to their slots; a `server.engine.native.Keep`."""
    if key.shape[1] != len(slots):
        raise ValueError(f"{key.shape[1]} rows are kept in {len(slots)} slots")
    key, value = (some if some.stride(-1) == 1 else some.contiguous() for some in (key, value))
    (num_heads, num_rows, size), value_size = key.shape, value.shape[-1]
    with torch.cuda.device(key.device) if key.is_cuda else nullcontext():
        _keep[(num_rows, num_heads)](
            key, value, keys, values, slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            keys.stride(0), values.stride(0), size, value_size, triton.next_power_of_2(size),
            triton.next_power_of_2(value_size),
        )  # fmt: skip
