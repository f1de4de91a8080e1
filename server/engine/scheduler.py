"""Which passes run in the next step. Pure Python: no tensors.

A response that is being written goes on in every step, so what is running stays fluent. What is left of a step's rows
goes to prompts, first to those that have had the fewest passes: a short one is not stuck behind a long one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FEW = 32
"""Most rows of a pass that runs in every step; longer ones share what is left."""


@dataclass(frozen=True)
class Candidate:
    """One sequence that waits for its next pass."""

    name: str
    arrival: int
    """Lower ones came before."""
    num_rows: int
    """Tokens and copies of `[CLS]` of the pass."""
    num_new_pages: int
    """Pages that it takes besides those it has."""
    num_pages: int
    """Pages that it has to itself."""
    num_passes: int
    """Passes that it has had."""


@dataclass(frozen=True)
class Plan:
    """What the next step does."""

    run: Sequence[str]
    evict: Sequence[str]
    """Sequences that lose their pages first, and compute them again later."""


def plan(candidates: Sequence[Candidate], *, num_rows: int, num_available: int) -> Plan:
    """Return what to run, and what to evict for it. The sequence that came first always runs.

    Where pages are short, sequences that came later give theirs to those that came before.

    Args:
        candidates: every running sequence.
        num_rows: rows of a step; only a single pass may have more.
        num_available: pages that nobody has.

    Raises:
        ValueError: if the first sequence cannot have the pages that it needs even alone.
    """
    run: list[Candidate] = []
    evicted: list[Candidate] = []
    rows_left = num_rows
    by_arrival = sorted(candidates, key=lambda one: one.arrival)
    first = by_arrival[:1]
    short = [one for one in by_arrival[1:] if one.num_rows <= FEW]
    long = sorted((one for one in by_arrival[1:] if one.num_rows > FEW), key=lambda one: (one.num_passes, one.arrival))
    for candidate in (*first, *short, *long):
        if candidate in evicted or (run and candidate.num_rows > rows_left):
            continue
        later = [one for one in by_arrival if one.arrival > candidate.arrival and one not in (*run, *evicted)]
        victims: list[Candidate] = []
        while candidate.num_new_pages > num_available + sum(one.num_pages for one in victims) and later:
            if (victim := later.pop()).num_pages:
                victims.append(victim)
        freed = sum(one.num_pages for one in victims)
        if candidate.num_new_pages > num_available + freed:
            if not run and candidate in first:
                raise ValueError(f"{candidate.name} needs {candidate.num_new_pages} pages, there are {num_available}")
            continue
        num_available += freed - candidate.num_new_pages
        rows_left -= candidate.num_rows
        evicted += victims
        run.append(candidate)
    return Plan([one.name for one in run], [one.name for one in evicted])
