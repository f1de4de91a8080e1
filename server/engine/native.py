"""What is written in C, or for a GPU in Triton, where that can be compiled; elsewhere PyTorch does the same, slower."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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
"""Takes queries, keys, values, output, rows, slots, offsets (all contiguous, indices int64) and the scaling."""


CPU = torch.device("cpu")


def attend_of(dtype: torch.dtype, device: torch.device = CPU) -> Attend | None:
    """Return the compiled attention for a precision on a device; None where there is none."""
    if device.type == "cuda":
        return _attend_of_gpu()
    library = _library("attend") if device.type == "cpu" else None
    if library is None or dtype not in NAMES:
        return None
    function = library[NAMES[dtype]]
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 6 + [ctypes.c_float]
    function.restype = ctypes.c_int

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
        tensors = (query, keys, values, output, rows, slots, offsets)
        sizes = (len(rows), query.shape[1], *keys.shape, values.shape[2])
        if function(*(tensor.data_ptr() for tensor in tensors), *sizes, scaling):
            raise MemoryError("there is no memory for attention")

    return attend


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
    function = library["multiply"]
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
    function.restype = None

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor) -> None:
        start = None if bias is None else bias.data_ptr()
        function(x.data_ptr(), weight.data_ptr(), start, product.data_ptr(), *x.shape, product.shape[1])

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
