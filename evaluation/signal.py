"""Measure the signal of a running server through `POST /v1/safety/score`.

    python -m evaluation.signal --server http://127.0.0.1:8000 --data ../shared/data/eval --out runs/signal

Scores are kept row by row (hashes, never texts), so an interrupted run goes on where it stopped. The
result is `summary.json` and `summary.md`: AUROC and F1 at `flag` per source, and how much is refused
or stopped at `block`, each with n and a 95 % interval.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from openai import OpenAI, OpenAIError
from rich.progress import track
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from evaluation.intervals import Estimate, bootstrap, wilson
from evaluation.rows import Row, read, sha256

PARALLEL = 4
"""Requests in flight. The server takes them in turn; more only hides the latency of HTTP."""

PROBE = "How does ballast keep a ship upright?"

REQUEST_GROUPS = {"XSTest + NotInject + do-not-answer": ("XSTest", "NotInject", "do-not-answer")}
"""Sources that are measured together, because one of them alone holds a single class."""


@dataclass(frozen=True)
class Score:
    """What the server said of one row."""

    source: str
    label: int
    risk: float
    is_over_block: bool
    is_flagged: bool


def ask(client: OpenAI, model: str, row: Row) -> Score:
    """Return the server's risk for a row: the response risk where it has a response, else the request risk."""
    messages = [{"role": "user", "content": row.prompt}]
    side = "request" if row.response is None else "response"
    if row.response is not None:
        messages.append({"role": "assistant", "content": row.response})
    answer: dict[str, Any] = client.post(
        "/safety/score", cast_to=dict[str, Any], body={"model": model, "messages": messages}
    )
    risk = float(answer[f"{side}_risk"])
    return Score(row.source, row.label, risk, risk > answer["thresholds"][side]["block"], answer["flagged"][side])


def require_same_head(client: OpenAI, model: str, out: Path) -> None:
    """Refuse to add to results of another head: its answer to a fixed probe tells it from others.

    Raises:
        ValueError: if `out` holds results of another head.
    """
    found = json.dumps([model, asdict(ask(client, model, Row("probe", PROBE, PROBE, 0)))])
    path = out / "head.json"
    if path.exists() and path.read_text(encoding="utf-8") != found:
        raise ValueError(f"{out} holds results of another head; choose another --out")
    path.write_text(found, encoding="utf-8")


def score_all(client: OpenAI, model: str, rows: Sequence[Row], journal: Path) -> list[Score]:
    """Return a score for every row, asking only for those that `journal` does not hold yet.

    Raises:
        OpenAIError: if the server refuses a row or cannot be reached; what was scored is kept.
    """
    done: dict[str, Score] = {}
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            key = entry.pop("key")
            done[key] = Score(**entry)
    missing = list({row.key: row for row in rows if row.key not in done}.values())
    with ThreadPoolExecutor(PARALLEL) as pool, journal.open("a", encoding="utf-8") as file:
        scores: Iterator[Score] = pool.map(lambda row: ask(client, model, row), missing)
        for row, score in zip(missing, track(scores, journal.stem, total=len(missing)), strict=True):
            done[row.key] = score
            file.write(json.dumps({"key": row.key, **asdict(score)}) + "\n")
    return [replace(done[row.key], source=row.source, label=row.label) for row in rows]


def separation(
    scores: Sequence[Score], groups: Mapping[str, Sequence[str]] | None = None, resamples: int = 1000
) -> dict[str, Any]:
    """Return AUROC, average precision and F1 at `flag` per source, and per group, that holds both classes."""

    def estimate(scores: list[float], metric: Callable[[Any, Any], float]) -> Estimate:
        return bootstrap(labels, scores, metric, resamples=resamples)

    by_source: dict[str, list[Score]] = defaultdict(list)
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
        }
    return result


def shares_over_block(scores: Iterable[Score]) -> dict[str, Estimate]:
    """Return, per source and label, the share that the policy would act on."""
    groups: dict[str, list[bool]] = defaultdict(list)
    for score in scores:
        groups[f"{score.source}, {'harmful' if score.label else 'harmless'}"].append(score.is_over_block)
    return {name: wilson(sum(hits), len(hits)) for name, hits in sorted(groups.items())}


def measure(
    client: OpenAI, model: str, data: Path, answers: Path | None, out: Path, resamples: int = 1000
) -> dict[str, Any]:
    """Score every file of `data` and return the summary."""
    require_same_head(client, model, out)
    files = {
        "requests": [(data / "prompts.jsonl", None), (data / "direct.jsonl", 1), (data / "benign_prompts.jsonl", 0)],
        "responses": [(data / "responses.jsonl", None), *([(answers, 0)] if answers else [])],
    }
    summary: dict[str, Any] = {"model": model, "data": {}}
    for side, parts in files.items():
        rows = [row for path, label in parts for row in read(path, label=label)]
        if side == "requests":
            rows = [Row(row.source, row.prompt, None, row.label) for row in rows]
        scores = score_all(client, model, rows, out / f"{side}.jsonl")
        summary[side] = {
            "separation": separation(scores, REQUEST_GROUPS if side == "requests" else None, resamples),
            "over_block": shares_over_block(scores),
        }
        summary["data"] |= {path.name: sha256(path) for path, _ in parts}
    return summary


def as_markdown(summary: dict[str, Any]) -> str:
    """Return the summary as Markdown tables."""
    lines = []
    for side, acted in (("requests", "refused"), ("responses", "stopped")):
        lines += [f"### {side.capitalize()}", ""]
        lines += [
            "| source | n | AUROC | F1 at `flag` | all harmful: F1 | average precision |",
            "|---|---|---|---|---|---|",
        ]
        for source, found in summary[side]["separation"].items():
            cells = [_cell(found[name]) for name in ("auroc", "f1_at_flag")]
            trivial, precision = f"{found['f1_calling_all_harmful']:.3f}", _cell(found["average_precision"])
            lines.append(f"| {source} | {found['auroc'].n} | {' | '.join(cells)} | {trivial} | {precision} |")
        lines += ["", f"| source | n | {acted} at `block` |", "|---|---|---|"]
        for name, share in summary[side]["over_block"].items():
            lines.append(f"| {name} | {share.n} | {share.value:.2%} [{share.low:.2%}, {share.high:.2%}] |")
        lines.append("")
    return "\n".join(lines)


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure the safety signal of a running server.")
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of the server (%(default)s)")
    parser.add_argument("--api-key", default="none", help="key, where the server asks for one")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with prompts, direct, benign_prompts, responses"
    )
    parser.add_argument("--answers", type=Path, help="JSON lines of benign answers: prompt, response")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap intervals (%(default)s)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    client = OpenAI(base_url=f"{args.server}/v1", api_key=args.api_key, timeout=300)
    try:
        model = client.models.list().data[0].id
        summary = measure(client, model, args.data, args.answers, args.out, args.resamples)
    except (OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.signal: {error}\n")
        return 1
    (args.out / "summary.json").write_text(json.dumps(summary, default=asdict, indent=2) + "\n", encoding="utf-8")
    (args.out / "summary.md").write_text(as_markdown(summary), encoding="utf-8")
    sys.stdout.write(as_markdown(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
