"""Runs as they lie on disk: what a run is of, what was released, and what was scored."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation import onsets, signal
from evaluation.onsets import Scored
from evaluation.samples import Journal, Sample
from evaluation.signal import Score
from evaluation.suite import SCORED

FACTS = "run.json"


@dataclass(frozen=True)
class Run:
    """What came of a suite so far."""

    folder: Path
    facts: dict[str, Any]
    """Suite, target, settings, measures, checksums."""
    samples: dict[str, list[Sample]]
    """By measure, of attacks and harmless prompts."""
    scores: dict[str, list[Score]]
    """By side, `requests` and `responses`."""
    onsets: list[Scored]

    @property
    def missing(self) -> dict[str, int]:
        """Attempts that are still to be made, by measure."""
        done = {name: len(some) for name, some in self.samples.items()}
        return {
            name: count - done[name] for name, count in self.facts["attempts"].items() if count > done.get(name, count)
        }


def read(folder: Path) -> Run:
    """Return a run.

    Raises:
        ValueError: if the folder holds none, or what it holds cannot be read.
    """
    path = folder / FACTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: {path} does not exist")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    samples: dict[str, list[Sample]] = {}
    scores: dict[str, list[Score]] = {}
    scored: list[Scored] = []
    for name, measure in facts["measures"].items():
        journal = folder / f"{name}.jsonl"
        if measure["kind"] == "onsets":
            scored += onsets.read_journal(journal).values()
        elif measure["kind"] in SCORED:
            scores.setdefault(measure["kind"], []).extend(signal.read_journal(journal).values())
        else:
            samples[name] = list(Journal(journal))
    if not any(samples.values()) and not any(scores.values()) and not scored:
        raise ValueError(f"{folder} holds no sample yet")
    return Run(folder, facts, samples, scores, scored)


def settle(path: Path, facts: dict[str, Any]) -> None:
    """Write what the run is of, or see that it is the same that was written.

    Raises:
        ValueError: naming what differs.
    """
    if not path.is_file():
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name, value in facts.items() if before.get(name) != json.loads(json.dumps(value))]:
        raise ValueError(f"{path.parent} holds a run with another {', '.join(other)}; choose another --out")


def names(runs: Iterable[Run]) -> list[str]:
    """Return a name for each run: that of its folder, or of the one above where two are called alike."""
    folders = [run.folder.resolve() for run in runs]
    found = [folder.name for folder in folders]
    return found if len(set(found)) == len(found) else [f"{folder.parent.name}/{folder.name}" for folder in folders]
