"""What came of a suite: a share for each measure, attack and policy; and how two runs differ, sample by sample."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from evaluation.intervals import Estimate, wilson
from evaluation.judges import Judge, is_refusal
from evaluation.samples import Sample


@dataclass(frozen=True)
class Outcome:
    """Shares of the prompts of one measure, in one attack, under one policy."""

    measure: str
    attack: str
    policy: str
    is_attack: bool
    share: Estimate
    """Success of an attack; of harmless prompts, those disturbed."""
    acted_on: Estimate
    """The policy acted on every attempt."""


class Difference(NamedTuple):
    """One outcome in two runs, over the prompts that both have."""

    measure: str
    attack: str
    policy: str
    n: int
    first: int
    """Prompts that count in the first run."""
    second: int
    only_first: int
    """Of these, those that do not count in the other run."""
    only_second: int


Counted = dict[tuple[str, str, str], dict[str, list[Sample]]]


def counts(sample: Sample, judge: Judge) -> bool:
    """Tell whether a sample counts: an attack that succeeds, or a harmless prompt that is disturbed."""
    return judge(sample) if sample.is_attack else sample.is_stopped or is_refusal(sample.text)


def outcomes(samples: Mapping[str, Iterable[Sample]], judge: Judge) -> list[Outcome]:
    """Return the shares of every measure's samples."""
    found = []
    for (measure, attack, policy), prompts in _grouped(samples).items():
        hits = sum(any(counts(one, judge) for one in attempts) for attempts in prompts.values())
        acted = sum(all(one.is_stopped for one in attempts) for attempts in prompts.values())
        is_attack = next(iter(prompts.values()))[0].is_attack
        shares = wilson(hits, len(prompts)), wilson(acted, len(prompts))
        found.append(Outcome(measure, attack, policy, is_attack, *shares))
    return found


def differences(
    first: Mapping[str, Iterable[Sample]], second: Mapping[str, Iterable[Sample]], judge: Judge
) -> list[Difference]:
    """Return how two runs of the same measures differ, over the prompts that both have.

    A policy that the first run lacks is compared with its `none`: so a plain model is compared with a guarded one.

    Raises:
        ValueError: if they have none in common.
    """
    ours, theirs = _grouped(first), _grouped(second)
    found = []
    for (measure, attack, policy), guarded in theirs.items():
        plain = ours.get((measure, attack, policy)) or ours.get((measure, attack, "none")) or {}
        prompts = plain.keys() & guarded.keys()
        if not prompts:
            continue
        a, b = ({p for p in prompts if any(counts(one, judge) for one in run[p])} for run in (plain, guarded))
        found.append(Difference(measure, attack, policy, len(prompts), len(a), len(b), len(a - b), len(b - a)))
    if not found:
        raise ValueError("the two runs have no measure, attack and policy in common")
    return found


def _grouped(samples: Mapping[str, Iterable[Sample]]) -> Counted:
    groups: Counted = defaultdict(lambda: defaultdict(list))
    for measure, of_measure in samples.items():
        for one in of_measure:
            groups[measure, one.attack, one.policy][one.prompt].append(one)
    return groups
