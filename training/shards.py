"""Content-addressed files: work that is done once, survives an interruption, and is found again by what it is."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """Return a SHA-256 over JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a scratch path and move the result to `path`; a torn write is never found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
