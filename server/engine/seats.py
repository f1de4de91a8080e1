"""What runs the passes of sequences, as the worker sees it; and the plain way, in which each runs alone."""

from collections.abc import Sequence
from typing import Any, Protocol

from model.chat import EncodedPrompt
from model.guarded_lm import GuardedLM
from model.passes import Pass, Passed, Solo
from server.engine.scheduler import Size


class Runner(Protocol):
    """Keeps sequences, each in a seat, and runs passes of several at once."""

    @property
    def longest(self) -> int:
        """Most tokens that one sequence can have."""
        ...

    @property
    def most_running(self) -> int | None:
        """Sequences that it pays to run at a time; None leaves it to the cache."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that one step should have at most."""
        ...

    @property
    def num_available(self) -> int:
        """Pages that nobody has."""
        ...

    @property
    def usage(self) -> float:
        """Share of the pages that sequences have, 0 to 1."""
        ...

    def reset(self) -> None:
        """Forget all sequences."""
        ...

    def open(self, prompt: EncodedPrompt, *, salt: str = "", watches_request: bool = True) -> Any:
        """Return a seat for a sequence that will read this prompt."""
        ...

    def close(self, seat: Any) -> None:
        """Give back all that a sequence has."""
        ...

    def evict(self, seat: Any) -> None:
        """Take a sequence's pages; it computes them again before its next pass."""
        ...

    def next_pass(self, seat: Any, asked: Pass) -> Pass:
        """Return the pass that a sequence asked for, or before it one over what was evicted."""
        ...

    def size_of(self, seat: Any, asked: Pass) -> Size:
        """Return what a pass takes."""
        ...

    def run(self, batch: Sequence[tuple[Any, Pass]]) -> list[Passed | Exception]:
        """Run one pass of each of these sequences; an exception is that sequence's alone."""
        ...


def run_one(runner: Runner, seat: Any, asked: Pass) -> Passed:
    """Run a pass by itself; raises what it raised."""
    (passed,) = runner.run([(seat, asked)])
    if isinstance(passed, Exception):
        raise passed
    return passed


class Solos:
    """Runs each sequence alone, one after the other: for models whose attention cannot be changed."""

    most_running = 8
    num_rows = 1024
    num_available = 0
    usage = 0.0

    def __init__(self, lm: GuardedLM) -> None:
        self._lm = lm

    @property
    def longest(self) -> int:
        """The model's context."""
        return self._lm.context_length

    def reset(self) -> None:
        """Do nothing: seats keep everything themselves."""

    def open(self, prompt: EncodedPrompt, *, salt: str = "", watches_request: bool = True) -> Solo:
        """Return a seat; nothing is shared."""
        return Solo(self._lm, prompt)

    def close(self, seat: Solo) -> None:
        """Do nothing: keys and values go with the seat."""

    def evict(self, seat: Solo) -> None:
        """Do nothing: there are no pages."""

    def next_pass(self, seat: Solo, asked: Pass) -> Pass:
        """Return what was asked for."""
        return asked

    def size_of(self, seat: Solo, asked: Pass) -> Size:
        """Return the rows of a pass, which takes no pages."""
        return Size(len(asked.token_ids) + len(asked.spans), 0, 0)

    def run(self, batch: Sequence[tuple[Solo, Pass]]) -> list[Passed | Exception]:
        """Run the passes one after the other."""
        return [_run(seat, asked) for seat, asked in batch]


def _run(seat: Solo, asked: Pass) -> Passed | Exception:
    try:
        return seat.run(asked)
    except Exception as error:
        return error
