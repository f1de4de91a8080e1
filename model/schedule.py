"""At which positions of a response an assessment is due. Pure Python.

Source: Li & Kim 2025 (arXiv 2505.17072), dynamic re-classification. Deviation: no schedule ever
stops, because harm that begins after the last assessment would never be seen.
"""

from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Says how many tokens may pass until the next assessment."""

    def interval(self, position: int) -> int:
        """Return the number of tokens (at least 1) from `position` to the next assessment."""
        ...


@dataclass(frozen=True)
class Every:
    """An assessment at every token."""

    def interval(self, position: int) -> int:
        """Return 1."""
        return 1


@dataclass(frozen=True)
class Periodic:
    """An assessment every `period` tokens."""

    period: int

    def __post_init__(self) -> None:
        if self.period < 1:
            raise ValueError(f"period must be at least 1, got {self.period}")

    def interval(self, position: int) -> int:
        """Return the period."""
        return self.period


@dataclass(frozen=True)
class Annealed:
    """Dense at first, then sparser, never sparser than one assessment per `floor` tokens.

    The published schedule is not known (`annealing` in the authors' code, which stops at the end);
    ours is every token up to 10, every 2nd up to 30, every 5th up to 100, every 10th up to 300.
    """

    steps: tuple[tuple[int, int], ...] = ((10, 1), (30, 2), (100, 5), (300, 10))
    floor: int = 25

    def interval(self, position: int) -> int:
        """Return the interval of the first step that ends after `position`, else `floor`."""
        return next((interval for end, interval in self.steps if position < end), self.floor)


@dataclass(frozen=True)
class First:
    """No assessment of the response but the last one: the cheapest schedule, for ablations."""

    def interval(self, position: int) -> int:
        """Return more tokens than any context holds."""
        return 2**31


def parse(name: str, *, longest: int | None = None) -> Schedule:
    """Return the schedule of a name: `every`, `first`, `annealed` or `periodic-N`.

    Args:
        name: of the schedule.
        longest: the most tokens between two assessments of `annealed`; None takes its own floor.

    Raises:
        ValueError: if there is no such schedule.
    """
    if name == "annealed" and longest is not None:
        steps = tuple((end, min(interval, longest)) for end, interval in Annealed.steps)
        return Annealed(steps, min(Annealed.floor, longest))
    known: dict[str, Schedule] = {"every": Every(), "first": First(), "annealed": Annealed()}
    if name in known:
        return known[name]
    kind, _, period = name.partition("-")
    if kind == "periodic" and period.isdecimal() and int(period) > 0:
        return Periodic(int(period))
    raise ValueError(f"unknown schedule {name!r}; there are every, first, annealed and periodic-N, as in periodic-8")


def positions(schedule: Schedule, length: int) -> list[int]:
    """Return where a response of `length` tokens is assessed in which nothing is suspicious: its end is in it."""
    found = [0]
    while found[-1] < length:
        found.append(min(found[-1] + schedule.interval(found[-1]), length))
    return found[1:]


def is_due(schedule: Schedule, position: int, assessed: int, *, is_suspicious: bool) -> bool:
    """Tell whether an assessment is due at `position`, the newest one being at `assessed`.

    A suspicious assessment makes every schedule dense until it clears.
    """
    interval = 1 if is_suspicious else schedule.interval(assessed)
    return position - assessed >= interval
