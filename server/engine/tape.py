"""Calls of compiled code, noted as they are made, and made again: what a CUDA graph is on a GPU, on a CPU.

What is noted is our own code in C, and the kernels that torch's compiler wrote. Whatever else computes something while
calls are noted is not on the tape: who plays one must see that it gives what it should.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codecache import PyCodeCache

from server.engine.library import library

MOST_ARGUMENTS = 32
"""Of a call that is noted; as in `play.c`."""


class Tape:
    """Calls that can be made again with the same tensors."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        """What the calls read and write."""
        self._calls: list[list[int]] = []
        self._laid: Tensor | None = None

    def note(self, address: int, arguments: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Add a call.

        Args:
            address: of the function.
            arguments: integers, or addresses of what `tensors` hold.
            tensors: stay as long as the tape.

        Raises:
            ValueError: if it cannot be made again.
        """
        if (missing := MOST_ARGUMENTS - len(arguments)) < 0:
            raise ValueError(f"a call has {len(arguments)} arguments, at most {MOST_ARGUMENTS} can be noted")
        if not address or not all(isinstance(argument, int) for argument in arguments):
            raise ValueError("a call has no address, or arguments that are no integers")
        self._calls.append([address, *arguments, *[0] * missing])
        self.kept += tensors
        self._laid = None

    def play(self) -> None:
        """Make all calls again, without Python between them.

        Raises:
            MemoryError: if one of them had no memory.
        """
        found = library("play")
        assert found is not None, "who can note calls has a compiler"
        if self._laid is None:
            self._laid = torch.tensor(self._calls, dtype=torch.long)
        found.play(ctypes.c_void_p(self._laid.data_ptr()), ctypes.c_int64(len(self._laid)))
        raise_if_failed()


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)
_lock = Lock()
failed = torch.zeros(1, dtype=torch.long)
"""Set by a call that had no memory: what a function returns is lost when it is played."""


def raise_if_failed() -> None:
    """Raise a MemoryError if a call had no memory since this was last asked."""
    if failed.item():
        failed.zero_()
        raise MemoryError("there is no memory for attention")


@contextmanager
def noting(tape: Tape) -> Iterator[None]:
    """Note the calls that this thread makes. One thread at a time."""
    with _lock:
        found = [(*kernel, partial(_call_kernel, kernel[2], _address_of(kernel[2]))) for kernel in _kernels()]
        token = _tape.set(tape)
        try:
            for module, name, _, noted in found:
                setattr(module, name, noted)
            yield
        finally:
            for module, name, kernel, _ in found:
                setattr(module, name, kernel)
            _tape.reset(token)


def _kernels() -> list[tuple[ModuleType, str, BuiltinFunctionType]]:
    """Return the kernels of torch's compiler, by module and name there."""
    return [
        (module, name, value)
        for module in PyCodeCache.modules
        for name, value in vars(module).items()
        if name.startswith("cpp_") and isinstance(value, BuiltinFunctionType)
    ]


def _address_of(kernel: BuiltinFunctionType) -> int:
    found = ctypes.CDLL(str(kernel.__self__.__file__))  # type: ignore[attr-defined]  # it is a module
    return ctypes.cast(found.kernel, ctypes.c_void_p).value or 0


def _call_kernel(kernel: Callable[..., None], address: int, *arguments: Any) -> None:
    """Call a kernel of torch's compiler, and note the call if it is of the thread that notes calls."""
    kernel(*arguments)
    if (tape := _tape.get()) is not None:
        integers = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        tape.note(address, integers, [value for value in arguments if isinstance(value, Tensor)])


def call(function: Any, tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
    """Call a function that takes addresses and integers, and note the call where calls are noted."""
    arguments = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    arguments += numbers
    if (tape := _tape.get()) is not None:
        address = ctypes.cast(function, ctypes.c_void_p).value or 0
        tape.note(address, arguments, [tensor for tensor in tensors if tensor is not None])
    function(*arguments)


def dense(tensor: Tensor, *, last: bool = False) -> Tensor:
    """Return a tensor whose elements, or those of the last dimension, lie side by side.

    Raises:
        ValueError: if that takes a copy while calls are noted: it would not be made again.
    """
    if tensor.stride(-1) == 1 if last else tensor.is_contiguous():
        return tensor
    if _tape.get() is not None:
        raise ValueError("a copy cannot be noted")
    return tensor.contiguous()
