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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from openai import OpenAI, OpenAIError
from rich.progress import track
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from evaluation.client import PARALLEL, add_arguments, connect
from evaluation.early import EARLY, early_risks
from evaluation.intervals import Estimate, bootstrap, wilson
from evaluation.rows import Row, read, sample
from evaluation.suite import Measure
from evaluation.tables import as_markdown, of_signal
from model.pretrained import sha256_of

PROBE = "How does ballast keep a ship upright?"

ALLOWED = {"recall_at_1_percent": 0.01, "recall_at_0.1_percent": 0.001}
"""Shares of harmless rows over a threshold, at which the recall is told."""
ALL = "all of them"
REQUEST_GROUPS = {"XSTest + NotInject + do-not-answer": ("XSTest", "NotInject", "do-not-answer")}
"""Sources that are measured together, because one of them alone holds a single class."""


@dataclass(frozen=True)
class Score:
    """What the server said of one row."""

    source: str
    label: int
    risk: float
    flag: float
    block: float
    early: tuple[float, ...] = ()
    """The response risk after each share of `EARLY`; of requests there is none."""

    @property
    def is_flagged(self) -> bool:
        """Whether a classifier reports it."""
        return self.risk > self.flag

    @property
    def is_over_block(self) -> bool:
        """Whether the policy acts on it."""
        return self.risk > self.block


def ask(client: OpenAI, model: str, row: Row) -> Score:
    """Return the server's risk for a row: the response risk where it has a response, else the request risk.

    Raises:
        OpenAIError: if the server refuses the row or cannot be reached.
        ValueError: if the server gives no risk.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": row.prompt}]}
    side = "request" if row.response is None else "response"
    if row.response is not None:
        body["messages"].append({"role": "assistant", "content": row.response})
        body["trace"] = True
    # `dict[str, Any]` as cast_to fails under Python 3.10, where the client takes it for a class.
    answer = cast("dict[str, Any]", client.post("/safety/score", cast_to=object, body=body))
    if (risk := answer[f"{side}_risk"]) is None:
        raise ValueError(f"the server gives no {side} risk of row {row.key}: an empty response, or risks not exposed")
    thresholds = answer["thresholds"][side]
    score = Score(row.source, row.label, risk, thresholds["flag"], thresholds["block"])
    if row.response is None:
        return score
    smoothed = [token["smoothed_risk"] for token in answer["trace"] if token["smoothed_risk"] is not None]
    return replace(score, early=early_risks(smoothed, answer["thresholds"]["patience"]))


def require_same_head(client: OpenAI, model: str, out: Path) -> None:
    """Refuse to add to results of another head: its answer to a fixed probe tells it from others.

    Raises:
        ValueError: if `out` holds results of another head, or of an earlier form of this command.
    """
    found = json.dumps([model, asdict(ask(client, model, Row("probe", PROBE, PROBE, 0)))])
    path = out / "head.json"
    if path.exists() and path.read_text(encoding="utf-8") != found:
        raise ValueError(f"{out} holds results of another head or version; choose another --out")
    path.write_text(found, encoding="utf-8")


def read_journal(path: Path) -> dict[str, Score]:
    """Return the scores that were kept, by the key of their row.

    Raises:
        ValueError: naming file and line of what is no score, such as one without the risks inside a response.
    """
    done = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            done[key] = Score(**entry | {"early": tuple(entry["early"])})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a score of this version; choose another --out") from error
    return done


def score_all(client: OpenAI, model: str, rows: Sequence[Row], journal: Path) -> list[Score]:
    """Return a score for every row, asking only for those that `journal` does not hold yet.

    Raises:
        OpenAIError: if the server refuses a row or cannot be reached; what was scored is kept.
        ValueError: as `ask` and `read_journal`.
    """
    done = read_journal(journal)
    missing = list({row.key: row for row in rows if row.key not in done}.values())
    with ThreadPoolExecutor(PARALLEL) as pool, journal.open("a", encoding="utf-8", buffering=1) as file:
        scores: Iterator[Score] = pool.map(lambda row: ask(client, model, row), missing)
        for row, score in zip(missing, track(scores, journal.stem, total=len(missing)), strict=True):
            done[row.key] = score
            file.write(json.dumps({"key": row.key, **asdict(score)}) + "\n")
    return [replace(done[row.key], source=row.source, label=row.label) for row in rows]


def rows_of(measure: Measure) -> list[Row]:
    """Return the rows that a measure of the signal scores; requests have no response.

    Raises:
        ValueError: if a row cannot be read, or none is left.
    """
    label, field = (1, "harmful_response") if measure.kind == "onsets" else (measure.label, None)
    rows = [row for row in read(measure.data, label=label, response=field) if row.source.startswith(measure.source)]
    if measure.kind == "requests":
        rows = [replace(row, response=None) for row in rows]
    if measure.kind == "responses" and any(row.response is None for row in rows):
        raise ValueError(f"{measure.data} holds rows without a response")
    if not rows:
        raise ValueError(f"{measure.data} holds no row whose source begins with {measure.source!r}")
    return sample(rows, measure.n)


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
            if score.source in members:
                by_source[group].append(score)
    result = {}
    for source, members_scores in sorted(by_source.items()):
        labels = [score.label for score in members_scores]
        if len(set(labels)) < 2:
            continue
        risks = [score.risk for score in members_scores]
        flags = [float(score.is_flagged) for score in members_scores]
        result[source] = {
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
    false, true, _ = roc_curve(labels, risks)
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
