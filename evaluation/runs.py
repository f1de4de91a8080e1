"""Runs as they lie on disk: what a run is of, what was released, and what was scored."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from evaluation import onsets, scores, search
from evaluation.onsets import Scored
from evaluation.samples import Journal, Sample
from evaluation.scores import Score
from evaluation.search import Searched
from evaluation.suite import SCORED, Policy

FACTS = "run.json"


@dataclass(frozen=True)
class Run:
    """What came of a suite so far."""

    folder: Path
    facts: dict[str, Any]
    """Suite, target, what served it, settings, measures, checksums."""
    samples: dict[str, list[Sample]]
    """By measure, of attacks and harmless prompts."""
    scores: dict[str, dict[str, Score]]
    """By side, `requests` and `responses`, and by key: a row of two measures counts once."""
    onsets: dict[str, list[Scored]]
    """By measure."""
    searched: dict[str, list[Searched]]
    """By measure."""
    missing: dict[str, int]
    """Attempts still to be made, and rows still to be scored, by measure."""


def read(folder: Path) -> Run:
    """Return a run.

    Raises:
        ValueError: if the folder holds none, or what it holds cannot be read.
    """
    path = folder / FACTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: {path} does not exist")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    run = Run(folder, facts, {}, {}, {}, {}, {})
    for name, measure in facts["measures"].items():
        journal = folder / f"{name}.jsonl"
        if measure["kind"] == "onsets":
            found = run.onsets[name] = list(onsets.read_journal(journal).values())
            count = len(found)
        elif measure["kind"] in SCORED:
            of_measure = scores.read_journal(journal)
            run.scores.setdefault(measure["kind"], {}).update(of_measure)
            count = len(of_measure)
        else:
            if measure["kind"] == "search":
                run.searched[name] = list(search.read_journal(wordings(folder, name)).values())
            run.samples[name] = sorted(Journal(journal), key=_place)
            count = len(run.samples[name])
        if count < facts["attempts"][name]:
            run.missing[name] = facts["attempts"][name] - count
    if not any(any(some.values()) for some in (run.samples, run.scores, run.onsets)):
        raise ValueError(f"{folder} holds no sample yet")
    return run


def wordings(folder: Path, name: str) -> Path:
    """Return the file of what a search found."""
    return folder / f"{name}.searched.jsonl"


def _place(one: Sample) -> tuple[int, int, str]:
    """Return what puts samples in the order of a report: a journal has them in the order in which they came."""
    depth = one.attack.rpartition(" ")[2]
    return get_args(Policy).index(one.policy), int(depth) if depth.isdigit() else 0, one.attack


def names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: that of its folder, with as many folders above it as tell it from the others.

    Raises:
        ValueError: if a run is there twice.
    """
    folders = [run.folder.resolve() for run in runs]
    if len(set(folders)) < len(folders):
        raise ValueError(f"a run is named twice among {', '.join(map(str, folders))}")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return ["/".join(folder.parts[-depth:]) for folder in folders]
