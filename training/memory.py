"""What the C library does with memory that is freed."""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt."""
NEVER = -1


def keep_freed() -> None:
    """Keep what is freed for what this process asks for next, until it ends; without glibc nothing happens.

    Every pass frees and asks for the same hundreds of megabytes again, and to give them back to the system and have
    them cleared anew takes time.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_MAX, 0)  # no pages of its own for a large array
        library.mallopt(TRIM_THRESHOLD, NEVER)
        library.mallopt(TOP_PAD, 2**28)
