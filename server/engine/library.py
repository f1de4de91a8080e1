"""Libraries out of the C files beside this one, compiled the first time that they are used on a machine."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from model.pretrained import cache_folder

logger = logging.getLogger(__name__)

FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)
"""`-fopenmp` takes the threads that torch has: its library of the same name is loaded already. Not `-ffast-math`, which
makes the whole process round small numbers to zero."""


@cache
def library(name: str) -> ctypes.CDLL | None:
    """Return a compiled library, compiling it the first time on this machine."""
    source, compiler = Path(__file__).with_name(f"{name}.c"), os.environ.get("CC", "cc")
    header = source.with_name("bfloat16.h").read_bytes()
    text = source.read_bytes() + header + repr((FLAGS, compiler, platform.processor(), processor())).encode()
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
def processor() -> str:
    """Return what the processor can do, so that a cache on a shared disk serves no other kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
