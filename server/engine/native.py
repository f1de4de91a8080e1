"""What is written in C, or for a GPU in Triton, where that can be compiled; elsewhere PyTorch does the same, slower."""

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from model.errors import origin
from server.engine.library import library, processor
from server.engine.tape import call, dense, failed, raise_if_failed

logger = logging.getLogger(__name__)

NAMES = {torch.bfloat16: "attend_bfloat16", torch.float32: "attend_float32"}

PAIRS = "avx512_bf16"
"""What a processor says that multiplies pairs of bfloat16."""
FOURS = "avx512_vnni"
"""What one says that multiplies and adds four numbers of 8 bits."""
FLOATS = frozenset({"avx2", "fma"})
"""What one says that multiplies and adds eight floats at a time, and pairs of numbers of 8 bits."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], None]
"""Takes queries, keys, values, output, rows, slots, offsets (all but queries contiguous, indices int64), and the
scaling."""
Keep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Takes new keys and values (H', R, D), the stores and the slots where they are kept, (R,)."""

CPU = torch.device("cpu")


def attend_of(dtype: torch.dtype, device: torch.device = CPU) -> Attend | None:
    """Return the compiled attention for a precision on a device; None where there is none."""
    if device.type == "cuda":
        return _attend_of_gpu(dtype, device)
    found = library("attend") if device.type == "cpu" else None
    if found is None or dtype not in NAMES:
        return None
    function = _function(found, NAMES[dtype], num_arguments=17)
    scalings: dict[float, Tensor] = {}

    def attend(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        output: Tensor,
        rows: Tensor,
        slots: Tensor,
        offsets: Tensor,
        scaling: float,
    ) -> None:
        if scaling not in scalings:
            scalings[scaling] = torch.tensor(scaling, dtype=torch.float32)
        tensors = (query, keys, values, output, rows, slots, offsets, scalings[scaling], failed)
        sizes = (len(rows), *query.stride()[:2], query.shape[1], *keys.shape, values.shape[2])
        call(function, tensors, sizes)
        raise_if_failed()

    return attend


def keep_of(device: torch.device = CPU) -> Keep | None:
    """Return what keeps keys and values of any precision; None where it is not compiled."""
    if device.type == "cuda":
        return _keep_of_gpu(device)
    found = library("attend") if device.type == "cpu" else None
    if found is None:
        return None
    function = _function(found, "keep", num_arguments=14)

    def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        if key.shape[1] != len(slots):
            raise ValueError(f"{key.shape[1]} rows are kept in {len(slots)} slots")
        key, value = dense(key, last=True), dense(value, last=True)
        num_bytes = key.element_size()
        strides = (key.stride(1), key.stride(0), value.stride(1), value.stride(0))
        of_bytes = (key.shape[2], value.shape[2], *strides)
        sizes = (len(slots), *keys.shape[:2], *(num_bytes * size for size in of_bytes))
        call(function, (key, value, keys, values, slots), sizes)

    return keep


Extend = Callable[
    [Sequence[Tensor], Sequence[int], Sequence[Tensor | None], Sequence[int]], tuple[Tensor, Sequence[Tensor]]
]
"""Takes states (R, D) by layer, N rows, sums before (S,) and lengths; returns what is read (N, 2 * S), and the sums."""
RiskLogits = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes features (N, F), weight (H, F) and bias of the first layer and those of the last; returns the logits (N,)."""


@cache
def extend_of(dtype: torch.dtype, device: torch.device = CPU) -> Extend | None:
    """Return what reads one more token of each passage; None where it is not compiled."""
    found = library("head") if device.type == "cpu" else None
    if found is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    function = _function(found, f"extend_{str(dtype).removeprefix('torch.')}", num_arguments=9)

    def extend(
        states: Sequence[Tensor], rows: Sequence[int], before: Sequence[Tensor | None], lengths: Sequence[int]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        width, size = states[0].shape[1], len(states) * states[0].shape[1]
        starts = [0 if total is None else total.data_ptr() for total in before]
        numbers = [*(state.data_ptr() for state in states), *rows, *starts, *lengths]
        lists = torch.split(torch.tensor(numbers), [len(states), *[len(rows)] * 3])
        totals, features = torch.empty(len(rows), size), torch.empty(len(rows), 2 * size)
        call(function, (*lists, totals, features), (len(rows), len(states), width))
        return features, totals.unbind()

    return extend


@cache
def risk_logits_of() -> RiskLogits | None:
    """Return the compiled risk head; None where it is not compiled."""
    found = library("head")
    if found is None:
        return None
    function = _function(found, "risk_logits", num_arguments=10)

    def risk_logits(features: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
        logits, found = torch.empty(len(features)), torch.empty(len(features), len(weight))
        sizes = (len(features), *weight.shape[::-1])
        call(function, (features, weight, bias, out, out_bias, found, logits), sizes)
        return logits

    return risk_logits


def likeliest(logits: Tensor) -> list[int]:
    """Return the first token of the highest logit of each row, (R, V) on the CPU, V >= 1."""
    tokens = torch.empty(len(logits), dtype=torch.long)
    if (function := _likeliest_of(logits.dtype)) is not None and logits.is_contiguous():
        call(function, (logits, tokens), logits.shape)
    elif len(logits):
        torch.argmax(logits, dim=-1, out=tokens)
    found: list[int] = tokens.tolist()
    return found


@cache
def _likeliest_of(dtype: torch.dtype) -> Any:
    """Return the compiled function; None where there is none for this precision."""
    found = library("likeliest") if dtype is torch.bfloat16 else None
    return None if found is None else _function(found, "likeliest", num_arguments=4)


def _function(found: ctypes.CDLL, name: str, *, num_arguments: int) -> Any:
    function = found[name]
    function.argtypes, function.restype = [ctypes.c_int64] * num_arguments, None
    return function


def _attend_of_gpu(dtype: torch.dtype, device: torch.device) -> Attend | None:
    try:
        from server.engine.kernels import attend

        some = torch.zeros(1, 1, 64, dtype=dtype, device=device)
        rows, offsets = torch.zeros(1, dtype=torch.long, device=device), torch.tensor([0, 1], device=device)
        attend(some, some, some, torch.empty_like(some), rows, rows, offsets, 1.0)
    except Exception as error:  # of imports, of compilers, of drivers
        logger.warning("PyTorch attends, slower, as Triton does not: %s", origin(error))
        return None
    return attend


def _keep_of_gpu(device: torch.device) -> Keep | None:
    try:
        from server.engine.kernels import keep

        some, slots = torch.zeros(1, 1, 64, device=device), torch.zeros(1, dtype=torch.long, device=device)
        keep(some, some, torch.zeros_like(some), torch.zeros_like(some), slots)
    except Exception as error:  # as above
        logger.warning("PyTorch keeps keys and values, slower, as Triton does not: %s", origin(error))
        return None
    return keep


Multiply = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""Takes rows (N, in), a weight as `server.engine.packed` lays it out, a bias (out), and the product (N, out): all
contiguous and in bfloat16."""
MultiplyInt8 = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], None]
"""Takes the same, but a weight as `server.engine.int8` lays it out, and room for the rows in 8 bits."""


@cache
def multiply_of() -> Multiply | None:
    """Return the compiled product in bfloat16; None where the processor or the compiler does not know it."""
    known = set(processor().split())
    found = library("multiply") if PAIRS in known or known >= FLOATS else None
    if found is None:
        return None
    function = _function(found, "multiply", num_arguments=7)

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor) -> None:
        call(function, (x, weight, bias, product), (*x.shape, product.shape[1]))

    return multiply


@cache
def multiply_int8_of() -> MultiplyInt8 | None:
    """Return the compiled product with weights in 8 bits; None where processor or compiler do not know it."""
    known = set(processor().split())
    found = library("multiply_int8") if known >= {PAIRS, FOURS} or known >= FLOATS else None
    if found is None:
        return None
    function = _function(found, "multiply_int8", num_arguments=8)

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor, read: Tensor) -> None:
        call(function, (x, weight, bias, product, read), (*x.shape, product.shape[1]))

    return multiply
