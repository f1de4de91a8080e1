"""Judge what attacks released: by refusal phrases, by a classifier, and by the labels of a reader.

    ballast-train head --config judge data=data/eval
    python -m evaluation.judge runs/prefill/prefill.jsonl --classifier runs/judge/checkpoint --sheet runs/sheet.jsonl
    # read the sheet, and write true or false for each "harmful"
    python -m evaluation.judge runs/prefill/prefill.jsonl --classifier runs/judge/checkpoint --labels runs/sheet.jsonl

Success is reported by attack, policy and judge. With labels, each judge is compared with the reader's.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.progress import track
from sklearn.metrics import cohen_kappa_score, f1_score

from evaluation.attack import summarise
from evaluation.judges import Judge, by_classifier, by_phrases
from evaluation.samples import Journal, Sample
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL


def choose(samples: Sequence[Sample], n: int, seed: int = 0) -> list[Sample]:
    """Return `n` random samples that released text, or all of them."""
    spoken = [sample for sample in samples if sample.text.strip()]
    return random.Random(seed).sample(spoken, min(n, len(spoken)))


def read_labels(path: Path) -> dict[str, bool]:
    """Return the reader's label by the key of its sample.

    Raises:
        ValueError: if a sample is not labelled.
    """
    labels = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not isinstance(row.get("harmful"), bool):
            raise ValueError(f"{path}, line {number}: harmful must be true or false, got {row.get('harmful')!r}")
        labels[str(row["key"])] = row["harmful"]
    return labels


def agreement(judged: Mapping[str, bool], labels: Mapping[str, bool]) -> str:
    """Return how a judge compares with labels of the same samples.

    Raises:
        ValueError: if no labelled sample was judged.
    """
    keys = sorted(judged.keys() & labels.keys())
    if not keys:
        raise ValueError("none of the labelled samples is among those judged")
    ours, theirs = [judged[key] for key in keys], [labels[key] for key in keys]
    return (
        f"F1 {f1_score(theirs, ours, zero_division=0):.3f}, kappa {cohen_kappa_score(theirs, ours):.3f}, "
        f"{sum(ours)} harmful against {sum(theirs)} (n = {len(keys)})"
    )


def judge_all(samples: Sequence[Sample], judge: Judge) -> dict[str, bool]:
    """Return the verdict of every sample by its key."""
    return {sample.key: judge(sample) for sample in track(samples, "verdicts")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Judge what attacks released.")
    parser.add_argument("journals", nargs="+", type=Path, help="files of evaluation.attack and evaluation.weights")
    parser.add_argument("--classifier", type=Path, help="checkpoint of a head that the judged signal knows nothing of")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model under it (%(default)s)")
    parser.add_argument("--sheet", type=Path, help="write random samples here, to be read and labelled")
    parser.add_argument("--n", type=int, default=100, help="samples of the sheet (%(default)s)")
    parser.add_argument("--labels", type=Path, help="a sheet with every `harmful` filled in")
    args = parser.parse_args(argv)
    try:
        samples = [sample for path in args.journals for sample in Journal(path)]
        if not samples:
            raise ValueError(f"no samples in {', '.join(map(str, args.journals))}")
        if args.sheet is not None:
            lines = [json.dumps({**asdict(one), "harmful": None}) + "\n" for one in choose(samples, args.n)]
            args.sheet.write_text("".join(lines), encoding="utf-8")
        judges: dict[str, Judge] = {"phrases": by_phrases}
        if args.classifier is not None:
            judges["classifier"] = by_classifier(args.classifier, args.model)
        verdicts = {name: judge_all(samples, judge) for name, judge in judges.items()}
        labels = read_labels(args.labels) if args.labels is not None else None
        for line in report(samples, verdicts, labels):
            sys.stdout.write(f"{line}\n")
    except (ModelError, OSError, KeyError, ValueError) as error:
        sys.stderr.write(f"evaluation.judge: {error}\n")
        return 1
    return 0


def report(
    samples: Sequence[Sample], verdicts: Mapping[str, Mapping[str, bool]], labels: Mapping[str, bool] | None
) -> list[str]:
    """Return the success of every attack by every judge, and how the judges agree, line by line."""

    def looked_up(judged: Mapping[str, bool]) -> Callable[[Sample], bool]:
        return lambda sample: judged[sample.key]

    lines = []
    for name, judged in verdicts.items():
        for (attack, policy), (success, _) in summarise(samples, looked_up(judged)).items():
            lines.append(f"{attack}, {policy}: success by {name} {success}")
    if len(verdicts) > 1:
        first, second = verdicts.values()
        lines.append(f"{' and '.join(verdicts)}: {agreement(second, first)}")
    if labels is not None:
        lines += [f"{name} and the reader: {agreement(judged, labels)}" for name, judged in verdicts.items()]
    return lines


if __name__ == "__main__":
    sys.exit(main())
