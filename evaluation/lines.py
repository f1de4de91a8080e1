"""Files of JSON lines that a command appends to. One that is killed leaves a torn last line, which counts as none."""

from pathlib import Path


def whole(path: Path) -> list[bytes]:
    """Return the lines of a file, less one that was torn; none where there is no file."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def mend(path: Path) -> None:
    """Cut off a torn last line, so that the next one begins on its own."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
