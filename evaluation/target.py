"""What is measured: a server that runs, or one that is started for a checkpoint or a model and stopped afterwards."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

READY_S = 600.0
"""How long a server may take until it is ready; the first start fetches weights."""
STOP_S = 30.0
"""How long it may take to stop, before it is killed."""
UNWATCHED = ("--checkpoint", "none", "--input-mode", "off", "--output-mode", "off")
"""What serves a plain model."""
KINDS = "http://ADDRESS, checkpoint:PATH or hub:NAME"


@contextmanager
def serving(target: str, model: str, log: Path) -> Iterator[str]:
    """Yield the address of a server of the target, without `/v1`.

    Args:
        target: an address; `checkpoint:` and a safety checkpoint of `model`; or `hub:` and a plain model, which is
            served without a signal. Settings of the environment hold for both.
        model: the model under a checkpoint.
        log: file of what a started server says.

    Raises:
        ValueError: if it is none of these.
        OSError: if the server does not come up; the message has the end of its log.
    """
    kind, _, name = target.partition(":")
    if kind in ("http", "https"):
        yield target.rstrip("/").removesuffix("/v1")
        return
    if kind not in ("checkpoint", "hub") or not name:
        raise ValueError(f"a target is {KINDS}, got {target!r}")
    words = ["--model", model, "--checkpoint", name] if kind == "checkpoint" else ["--model", name, *UNWATCHED]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", str(port), *words]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(address: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the server is ready.

    Raises:
        OSError: if it ends before that, or takes too long.
    """
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urlopen(f"{address}/readyz", timeout=5):
                return
        except OSError:  # an error of urllib too
            time.sleep(0.5)
    said = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
    raise OSError(f"the server did not start: {' '.join(said)} (all of it in {log})")
