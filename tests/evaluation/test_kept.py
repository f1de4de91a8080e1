"""Each result is kept as soon as it is there, whatever becomes of the others."""

import threading
import time
from pathlib import Path

import pytest

from evaluation import kept


def load(entry: dict[str, int]) -> int:
    return entry["found"]


def dump(found: int) -> dict[str, int]:
    return {"found": found}


def read(path: Path) -> dict[str, int]:
    return kept.read(path, load, "number")


def test_what_is_there_behind_one_that_hangs_is_kept(tmp_path: Path):
    path, seen = tmp_path / "kept.jsonl", []

    def find(number: int) -> int:
        until = time.monotonic() + 10
        while number == 0 and len(seen) < 5 and time.monotonic() < until:
            seen[:] = read(path)
            time.sleep(0.01)
        return number

    assert kept.fill(path, {}, {str(n): n for n in range(6)}, find, dump, 2) == {str(n): n for n in range(6)}
    assert set(seen) == {"1", "2", "3", "4", "5"}


def test_the_first_failure_ends_it_and_the_rest_is_found_next_time(tmp_path: Path):
    path, asked, broken = tmp_path / "kept.jsonl", [], True
    lock = threading.Lock()

    def find(number: int) -> int:
        with lock:
            asked.append(number)
        if broken and number == 3:
            raise OSError("gone")
        time.sleep(0.05)
        return number

    numbers = {str(n): n for n in range(20)}
    with pytest.raises(OSError, match="gone"):
        kept.fill(path, {}, numbers, find, dump, 2)
    assert len(asked) < 10  # what had not begun was left
    assert set(read(path)) == {str(n) for n in asked if n != 3}  # what had begun was waited for
    broken = False
    assert kept.fill(path, read(path), numbers, find, dump, 2) == numbers
    assert sorted(asked) == sorted([*numbers.values(), 3])


def test_a_torn_last_line_is_found_again(tmp_path: Path):
    path = tmp_path / "kept.jsonl"
    kept.fill(path, {}, {"a": 1, "b": 2}, lambda one: one, dump)
    path.write_text(path.read_text()[:-3])
    done = read(path)
    assert len(done) == 1
    assert kept.fill(path, done, {"a": 1, "b": 2}, lambda one: one, dump) == read(path) == {"a": 1, "b": 2}
    path.write_text("no JSON\n" + path.read_text())
    with pytest.raises(ValueError, match=r"kept.jsonl, line 1: not a number of this version"):
        read(path)
