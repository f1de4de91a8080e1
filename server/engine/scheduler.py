"""Which passes run in the next step. Pure Python: no tensors.

A response that is being written goes on in every step, and has steps to itself between two pieces of prompts, so what
is running stays fluent. What is left of a step's rows goes to prompts, first to those that have had the fewest passes,
and of them to the shortest: a short one is not stuck behind long ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHORT = 32
"""Most rows of a pass that runs in every step; longer ones share what is left."""
REST = 8
"""Rows that responses have to themselves between two steps with a longer pass: by then the first tokens of a response,
which are held back, have left."""


class Size(NamedTuple):
    """What a pass takes."""

    num_rows: int
    """Tokens and copies of `[CLS]` that must be computed."""
    num_new_pages: int
    """Pages besides those that its sequence has."""
    num_own_pages: int
    """Pages that the sequence has and shares with nobody."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """One sequence that waits for its next pass."""

    name: str
    arrival: int
    """Lower ones came before."""
    size: Size
    """Of the pass."""
    num_passes: int
    """Passes that it has had."""


@dataclass(frozen=True)
class Plan:
    """What the next step does."""

    run: Sequence[str]
    evict: Sequence[str]
    """Sequences that lose their pages first, and compute them again later."""


class Pace:
    """Lets what is being written go on by itself now and then, while prompts are read."""

    def __init__(self) -> None:
        self._num_left = 0

    def choose(self, candidates: Sequence[Candidate], *, num_available: int) -> Sequence[Candidate]:
        """Return who may run in the next step: all, or those alone that are being written.

        Args:
            candidates: every running sequence.
            num_available: pages that nobody has. Where they are too few, all must give and take.
        """
        short = [one for one in candidates if one.size.num_rows <= SHORT]
        fits = sum(one.size.num_new_pages for one in short) <= num_available
        if len(short) == len(candidates) or (short and fits and self._num_left > 0):
            self._num_left -= sum(one.size.num_rows for one in short)
            return short
        self._num_left = REST
        return candidates


def plan(candidates: Sequence[Candidate], *, num_rows: int, num_available: int) -> Plan:
    """Return what to run, and what to evict for it. Of the candidates, the one that came first always runs.

    Where pages are short, sequences that came later give theirs to those that came before.

    Args:
        candidates: running sequences, as `Pace` chose them.
        num_rows: rows of a step; the first of the long passes runs even if it has more, or none of them ever might.
        num_available: pages that nobody has.
    """
    run: list[Candidate] = []
    evicted: list[Candidate] = []
    rows_left = num_rows
    by_arrival = sorted(candidates, key=lambda one: one.arrival)
    first = by_arrival[:1]
    short = [one for one in by_arrival[1:] if one.size.num_rows <= SHORT]
    long = sorted(
        (one for one in by_arrival[1:] if one.size.num_rows > SHORT),
        key=lambda one: (one.num_passes, one.size.num_rows),
    )
    for candidate in (*first, *short, *long):
        is_in_turn = candidate in first or candidate in long[:1]
        if candidate in evicted or (candidate.size.num_rows > rows_left and not is_in_turn):
            continue
        num_missing = candidate.size.num_new_pages - num_available
        if num_missing > 0:
            later = [one for one in by_arrival if one.arrival > candidate.arrival and one not in (*run, *evicted)]
            victims, freed = _victims(later, num_missing)
            if freed < num_missing:
                if candidate not in first:
                    continue
                # Pages that they share with one another count for none of them, and are there all the same.
                victims = later
            num_available += freed
            evicted += victims
        num_available -= candidate.size.num_new_pages
        rows_left -= candidate.size.num_rows
        run.append(candidate)
    return Plan([one.name for one in run], [one.name for one in evicted])


def _victims(later: Sequence[Candidate], num_missing: int) -> tuple[list[Candidate], int]:
    """Return the last sequences whose own pages together are as many as are missing, or all, and how many those are."""
    victims: list[Candidate] = []
    freed = 0
    for one in reversed(later):
        if freed >= num_missing:
            break
        if one.size.num_own_pages:
            victims.append(one)
            freed += one.size.num_own_pages
    return victims, freed
