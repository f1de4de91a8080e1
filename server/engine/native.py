"""What is written in C, or for a GPU in Triton, where that can be compiled; elsewhere PyTorch does the same, slower."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from model.pretrained import cache_folder

logger = logging.getLogger(__name__)

FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
"""`-fopenmp` takes the threads that torch has: its library of the same name is loaded already. Not `-ffast-math`, which
makes the whole process round small numbers to zero."""
NAMES = {torch.bfloat16: "attend_bfloat16", torch.float32: "attend_float32"}

PAIRS = "avx512_bf16"
"""What a processor says that multiplies pairs of bfloat16."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], None]
"""Takes queries, keys, values, output, rows, slots, offsets (all but queries contiguous, indices int64), and the
scaling."""
Keep = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Takes new keys and values (H', R, D), the stores and the slots where they are kept, (R,)."""

MOST_ARGUMENTS = 32
"""Of a call that is noted."""


class Tape:
    """Calls of compiled code, noted as they are made, that can be made again with the same tensors."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        """What the calls read and write."""
        self._calls: list[list[int]] = []
        self._laid: Tensor | None = None

    def __len__(self) -> int:
        return len(self._calls)

    def note(self, address: int, arguments: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Add a call.

        Args:
            address: of the function.
            arguments: integers, or addresses of what `tensors` hold.
            tensors: stay as long as the tape.

        Raises:
            ValueError: if it has too many arguments.
        """
        if (missing := MOST_ARGUMENTS - len(arguments)) < 0:
            raise ValueError(f"a call has {len(arguments)} arguments, at most {MOST_ARGUMENTS} can be noted")
        self._calls.append([address, *arguments, *[0] * missing])
        self.kept += tensors
        self._laid = None

    def play(self) -> None:
        """Make all calls again, without Python between them."""
        library = _library("play")
        assert library is not None, "who can note calls has a compiler"
        if self._laid is None:
            self._laid = torch.tensor(self._calls, dtype=torch.long)
        library.play(ctypes.c_void_p(self._laid.data_ptr()), ctypes.c_int64(len(self._laid)))


_noting: ContextVar[Tape | None] = ContextVar("noting", default=None)
"""Where calls are noted just now."""


@contextmanager
def noting(tape: Tape) -> Iterator[None]:
    """Note the calls of what is compiled here, and of the kernels of torch's compiler."""
    token, found = _noting.set(tape), _kernels()
    for module, name, kernel in found:
        setattr(module, name, partial(_noted, kernel, _address_of(kernel)))
    try:
        yield
    finally:
        for module, name, kernel in found:
            setattr(module, name, kernel)
        _noting.reset(token)


def _kernels() -> list[tuple[ModuleType, str, BuiltinFunctionType]]:
    """Return the kernels of torch's compiler, by module and name there."""
    return [
        (module, name, value)
        for module in PyCodeCache.modules
        for name, value in vars(module).items()
        if name.startswith("cpp_") and isinstance(value, BuiltinFunctionType)
    ]


def _address_of(kernel: BuiltinFunctionType) -> int:
    library = ctypes.CDLL(str(kernel.__self__.__file__))  # type: ignore[attr-defined]  # it is a module
    return ctypes.cast(library.kernel, ctypes.c_void_p).value or 0


def _noted(kernel: Callable[..., None], address: int, *arguments: Tensor | int) -> None:
    """Call a kernel of torch's compiler, and note the call."""
    kernel(*arguments)
    tape = _noting.get()
    assert tape is not None
    integers = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
    tape.note(address, integers, [value for value in arguments if isinstance(value, Tensor)])


def _call(function: Any, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> int:
    """Call a function that takes addresses and integers, and note the call where calls are noted."""
    arguments = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    arguments += numbers
    if (tape := _noting.get()) is not None:
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        tape.note(address, arguments, [tensor for tensor in tensors if tensor is not None])
    return int(function(*arguments) or 0)


CPU = torch.device("cpu")


def attend_of(dtype: torch.dtype, device: torch.device = CPU) -> Attend | None:
    """Return the compiled attention for a precision on a device; None where there is none."""
    if device.type == "cuda":
        return _attend_of_gpu()
    library = _library("attend") if device.type == "cpu" else None
    if library is None or dtype not in NAMES:
        return None
    function = _function(library, NAMES[dtype], num_arguments=16, result=ctypes.c_int)
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
        if query.stride(2) != 1:
            query = query.contiguous()
        tensors = (query, keys, values, output, rows, slots, offsets, scalings[scaling])
        sizes = (len(rows), *query.stride()[:2], query.shape[1], *keys.shape, values.shape[2])
        if _call(function, tensors, sizes):
            raise MemoryError("there is no memory for attention")

    return attend


def keep_of(device: torch.device = CPU) -> Keep | None:
    """Return what keeps keys and values of any precision; None where it is not compiled."""
    library = _library("attend") if device.type == "cpu" else None
    if library is None:
        return None
    function = _function(library, "keep", num_arguments=14, result=None)

    def keep(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        if key.stride(2) != 1 or value.stride(2) != 1:
            key, value = key.contiguous(), value.contiguous()
        num_bytes = key.element_size()
        strides = (key.stride(1), key.stride(0), value.stride(1), value.stride(0))
        of_bytes = (key.shape[2], value.shape[2], *strides)
        sizes = (len(slots), *keys.shape[:2], *(num_bytes * size for size in of_bytes))
        _call(function, (key, value, keys, values, slots), sizes)

    return keep


Extend = Callable[
    [Sequence[Tensor], Sequence[int], Sequence[Tensor | None], Sequence[int]], tuple[Tensor, Sequence[Tensor]]
]
"""Takes states (R, D) by layer, N rows, sums before (S,) and lengths; returns what is read (N, 2 * S), and the sums."""
Risk = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes features (N, F), weight (H, F) and bias of the first layer and those of the last; returns the logits (N,)."""


@cache
def extend_of(dtype: torch.dtype, device: torch.device = CPU) -> Extend | None:
    """Return what reads one more token of each passage; None where it is not compiled."""
    library = _library("head") if device.type == "cpu" else None
    if library is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    function = _function(library, f"extend_{str(dtype).removeprefix('torch.')}", num_arguments=9, result=None)

    def extend(
        states: Sequence[Tensor], rows: Sequence[int], before: Sequence[Tensor | None], lengths: Sequence[int]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        width, size = states[0].shape[1], len(states) * states[0].shape[1]
        starts = [0 if total is None else total.data_ptr() for total in before]
        numbers = [*(state.data_ptr() for state in states), *rows, *starts, *lengths]
        lists = torch.split(torch.tensor(numbers), [len(states), *[len(rows)] * 3])
        totals, features = torch.empty(len(rows), size), torch.empty(len(rows), 2 * size)
        _call(function, (*lists, totals, features), (len(rows), len(states), width))
        return features, totals.unbind()

    return extend


@cache
def risk_of() -> Risk | None:
    """Return the compiled risk head; None where it is not compiled."""
    library = _library("head")
    if library is None:
        return None
    function = _function(library, "risk", num_arguments=10, result=None)

    def risk(features: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Tensor:
        logits, found = torch.empty(len(features)), torch.empty(len(features), len(weight))
        sizes = (len(features), *weight.shape[::-1])
        _call(function, (features, weight, bias, out, out_bias, found, logits), sizes)
        return logits

    return risk


def _function(library: ctypes.CDLL, name: str, *, num_arguments: int, result: Any) -> Any:
    function = library[name]
    function.argtypes, function.restype = [ctypes.c_int64] * num_arguments, result
    return function


def _attend_of_gpu() -> Attend | None:
    try:
        from server.engine.kernels import attend
    except ImportError as error:
        logger.info("there is no Triton, PyTorch attends: %s", error)
        return None
    return attend


Multiply = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""Takes rows (N, in), a weight as `server.engine.packed` lays it out, a bias (out), and the product (N, out): all
contiguous and in bfloat16."""


@cache
def multiply_of() -> Multiply | None:
    """Return the compiled product in bfloat16; None where the processor or the compiler does not know it."""
    library = _library("multiply") if PAIRS in _processor().split() else None
    if library is None:
        return None
    function = _function(library, "multiply", num_arguments=7, result=None)

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor) -> None:
        _call(function, (x, weight, bias, product), (*x.shape, product.shape[1]))

    return multiply


@cache
def _library(name: str) -> ctypes.CDLL | None:
    """Return a compiled library, compiling it the first time on this machine."""
    source, compiler = Path(__file__).with_name(f"{name}.c"), os.environ.get("CC", "cc")
    text = source.read_bytes() + repr((FLAGS, compiler, platform.processor(), _processor())).encode()
    path = cache_folder() / "native" / f"{name}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                command = [*shlex.split(compiler), *FLAGS, str(source), "-o", str(made), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                made.replace(path)  # two processes may do so at the same time
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("%s.c could not be compiled, PyTorch does the same: %s", name, type(error).__name__)
        return None


@cache
def _processor() -> str:
    """Return what the processor can do, so that a cache on a shared disk serves no other kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
