"""Keeping what is freed."""

import subprocess
import sys

import pytest

FREES = """
from training.memory import keep_freed
if {keeps}: keep_freed()
import torch
torch.ones(2**26); torch.ones(2**26)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


def resident(keeps: bool) -> int:
    """Return the KiB that a process holds after it has freed 256 MiB."""
    found = subprocess.run(
        [sys.executable, "-c", FREES.format(keeps=keeps)], capture_output=True, text=True, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone")
def test_what_is_freed_stays_with_the_process():
    assert resident(keeps=True) > resident(keeps=False) + 200 * 1024


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", None)  # would fail
    from training.memory import keep_freed

    keep_freed()
