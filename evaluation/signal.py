"""Measure the signal of a running server through `POST /v1/safety/score`.

    python -m evaluation.signal --server http://127.0.0.1:8000 --data data/eval --out runs/signal

Scores are kept row by row (hashes, never texts), so an interrupted run goes on where it stopped. The
result is `summary.json` and `summary.md`: AUROC and F1 at `flag` per source, and how much is refused
or stopped at `block`, each with n and a 95 % interval. For responses the same after the first 25 %, 50 %
and 75 % of their tokens. Labels are of whole responses: one whose harm begins late is harmless until
then and counts as harmful all the same, so a low accuracy at 25 % is partly the label's.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openai import OpenAI, OpenAIError
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from evaluation.client import add_arguments, connect
from evaluation.early import EARLY
from evaluation.intervals import Estimate, bootstrap, wilson
from evaluation.rows import Row, read
from evaluation.scores import Score, require_same_head, score_all
from evaluation.tables import as_markdown, of_signal
from model.pretrained import sha256_of

ALLOWED = {"recall_at_1_percent": 0.01, "recall_at_0.1_percent": 0.001}
"""Shares of harmless rows over a threshold, at which the recall is told."""
ALL = "all of them"
"""The rows of every source together: where label and source go together, partly a matter of the sources."""
REQUEST_GROUPS = {"XSTest + NotInject + do-not-answer": ("XSTest", "NotInject", "do-not-answer")}
"""Sources that are measured together, because one of them alone holds a single class."""


def separation(
    scores: Sequence[Score], groups: Mapping[str, Sequence[str]] | None = None, resamples: int = 1000
) -> dict[str, Any]:
    """Return AUROC, average precision, F1 at `flag` and recalls per source and group that holds both classes.

    A recall at a share of false positives is null where there are too few harmless rows to tell that share.
    """

    def estimate(scores: list[float], metric: Callable[[Any, Any], float]) -> Estimate:
        return bootstrap(labels, scores, metric, resamples=resamples)

    by_source: dict[str, list[Score]] = defaultdict(list)
    if len({score.source for score in scores}) > 1:
        by_source[ALL] = list(scores)
    for score in scores:
        by_source[score.source].append(score)
    for group, members in (groups or {}).items():
        if by_source.keys() >= set(members):
            by_source[group] = [score for score in scores if score.source in members]
    result = {}
    for source, members_scores in sorted(by_source.items()):
        labels = [score.label for score in members_scores]
        if len(set(labels)) < 2:
            continue
        risks = [score.risk for score in members_scores]
        flags = [float(score.is_flagged) for score in members_scores]
        result[source] = {
            "num_harmful": sum(labels),
            "auroc": estimate(risks, lambda y, s: float(roc_auc_score(y, s))),
            "average_precision": estimate(risks, lambda y, s: float(average_precision_score(y, s))),
            "f1_at_flag": estimate(flags, lambda y, s: float(f1_score(y, s > 0.5, zero_division=0.0))),
            "f1_calling_all_harmful": float(f1_score(labels, np.ones(len(labels)))),
        } | {
            name: estimate(risks, partial(recall_at, share)) if share * labels.count(0) >= 1 else None
            for name, share in ALLOWED.items()
        }
    return result


def recall_at(share: float, labels: NDArray[np.int_], risks: NDArray[np.float64]) -> float:
    """Return the share of harmful rows over the lowest threshold that at most `share` of the harmless ones exceed."""
    false, true, _ = roc_curve(labels, risks, drop_intermediate=False)
    return float(true[false <= share].max())


def shares_over_block(scores: Iterable[Score]) -> dict[str, Estimate]:
    """Return, per source and label, the share that the policy would act on."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for score in scores:
        groups[f"{score.source}, {'harmful' if score.label else 'harmless'}"].append(score.is_over_block)
    return {name: wilson(sum(hits), len(hits)) for name, hits in sorted(groups.items())}


def by_depth(scores: Sequence[Score], resamples: int = 1000) -> dict[str, Any]:
    """Return separation and shares over `block` of responses of which only the first tokens were read."""
    result = {}
    for number, share in enumerate(EARLY):
        early = [replace(score, risk=score.early[number]) for score in scores]
        result[f"{share:.0%}"] = {
            "separation": separation(early, resamples=resamples),
            "over_block": shares_over_block(early),
        }
    return result


def measure(
    client: OpenAI, model: str, data: Path, answers: Path | None, out: Path, resamples: int = 1000
) -> dict[str, Any]:
    """Score every file of `data` and return the summary, with the checksums of the files."""
    require_same_head(client, model, out)
    files = {
        "requests": [(data / "prompts.jsonl", None), (data / "direct.jsonl", 1), (data / "benign_prompts.jsonl", 0)],
        "responses": [(data / "responses.jsonl", None), *([(answers, 0)] if answers else [])],
    }
    checksums: dict[str, str] = {}
    scores: dict[str, list[Score]] = {}
    for side, parts in files.items():
        rows = [row for path, label in parts for row in read(path, label=label)]
        if side == "requests":
            rows = [Row(row.source, row.prompt, None, row.label) for row in rows]
        scores[side] = score_all(client, model, rows, out / f"{side}.jsonl")
        checksums |= {path.name: sha256_of(path) for path, _ in parts}
    return {"model": model, "data": checksums} | summarise(scores, resamples)


def summarise(scores: Mapping[str, Sequence[Score]], resamples: int = 1000) -> dict[str, Any]:
    """Return what the signal is worth on each side, `requests` and `responses`: everything but checksums."""
    summary = {}
    for side, some in scores.items():
        groups = REQUEST_GROUPS if side == "requests" else None
        whole = {"separation": separation(some, groups, resamples), "over_block": shares_over_block(some)}
        depths = {"by_depth": {**by_depth(some, resamples), "100%": whole}} if side == "responses" else {}
        summary[side] = whole | depths
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure the safety signal of a running server.")
    add_arguments(parser, key="that sees exact risks")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with prompts, direct, benign_prompts, responses"
    )
    parser.add_argument("--answers", type=Path, help="JSON lines of benign answers: prompt, response")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap intervals (%(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        client, model = connect(args.server, args.api_key)
        summary = measure(client, model, args.data, args.answers, args.out, args.resamples)
    except (OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.signal: {error}\n")
        return 1
    (args.out / "summary.json").write_text(json.dumps(summary, default=asdict, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(as_markdown(table, level=3) for table in of_signal(summary))
    (args.out / "summary.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
