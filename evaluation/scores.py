"""What the signal of a running server says of labelled texts, asked through `POST /v1/safety/score` and kept.

The journal holds hashes and risks, never texts, so an interrupted run goes on where it stopped.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from openai import APIStatusError, OpenAI

from evaluation import kept
from evaluation.client import PARALLEL
from evaluation.early import early_risks
from evaluation.rows import Row, read, sample
from evaluation.suite import Measure

Answer = TypeVar("Answer")
UNABLE = (400, 403, 404, 405, 422, 501)
"""HTTP status of a server that does not do what was asked for, or not for this caller."""
PROBE = "How does ballast keep a ship upright?"


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


def post(client: OpenAI, model: str, row: Row, read: Callable[[dict[str, Any]], Answer]) -> Answer:
    """Have a row scored, token by token where it has a response, and return what `read` makes of the answer.

    Raises:
        OpenAIError: if the server refuses the row or cannot be reached.
        ValueError: if it answers as no server of this version does.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": row.prompt}]}
    if row.response is not None:
        body["messages"].append({"role": "assistant", "content": row.response})
        body["trace"] = True
    # `dict[str, Any]` as cast_to fails under Python 3.10, where the client takes it for a class.
    answer = cast("dict[str, Any]", client.post("/safety/score", cast_to=object, body=body))
    try:
        return read(answer)
    except (KeyError, TypeError) as error:
        raise ValueError(f"the server does not answer /safety/score as this version does: {error!r}") from error


def ask(client: OpenAI, model: str, row: Row) -> Score:
    """Return the server's risk for a row: the response risk where it has a response, else the request risk.

    Raises:
        OpenAIError: as `post`.
        ValueError: as `post`, and if the server gives no risk.
    """

    def read(answer: dict[str, Any]) -> Score:
        side = "request" if row.response is None else "response"
        if (risk := answer[f"{side}_risk"]) is None:
            raise ValueError(f"no {side} risk of row {row.key}: an empty response, or risks not exposed")
        thresholds = answer["thresholds"][side]
        score = Score(row.source, row.label, risk, thresholds["flag"], thresholds["block"])
        if row.response is None:
            return score
        smoothed = [token["smoothed_risk"] for token in answer["trace"] if token["smoothed_risk"] is not None]
        return replace(score, early=early_risks(smoothed, answer["thresholds"]["patience"]))

    return post(client, model, row, read)


def can_score(client: OpenAI, model: str) -> bool:
    """Tell whether the server shows its risks to this caller, token by token.

    Raises:
        APIStatusError: as `require_final`.
        OpenAIError: if it cannot be reached.
    """
    try:
        ask(client, model, Row("probe", PROBE, PROBE, 0))
    except APIStatusError as error:
        require_final(error)
        return False
    except ValueError:
        return False
    return True


def require_final(error: APIStatusError) -> None:
    """Raise an error that says nothing of what a server can do: it is busy, has failed, or refuses the key.

    Raises:
        APIStatusError: the error.
    """
    if error.status_code not in UNABLE:
        raise error


def require_same_head(client: OpenAI, model: str, out: Path) -> None:
    """Refuse to add to results of another head: its answer to a fixed probe tells it from others.

    Raises:
        ValueError: if `out` holds results of another head, or of an earlier form of this command.
    """
    found = json.dumps([model, asdict(ask(client, model, Row("probe", PROBE, PROBE, 0)))])
    path = out / "head.json"
    if path.read_text(encoding="utf-8") != found if path.exists() else any(out.glob("*.jsonl")):
        raise ValueError(f"{out} holds results of another head or version; choose another --out")
    path.write_text(found, encoding="utf-8")


def read_journal(path: Path) -> dict[str, Score]:
    """Return the scores that were kept, by the key of their row.

    Raises:
        ValueError: naming file and line of what is no score, such as one without the risks inside a response.
    """
    return kept.read(path, lambda entry: Score(**entry | {"early": tuple(entry["early"])}), "score")


def score_all(
    client: OpenAI, model: str, rows: Sequence[Row], journal: Path, *, parallel: int = PARALLEL
) -> list[Score]:
    """Return the scores of the rows, asking only for those that `journal` does not hold yet; invalid rows have none.

    Raises:
        OpenAIError: as `evaluation.kept.fill`.
        ValueError: as `ask` and `read_journal`.
    """
    asked = {row.key: row for row in rows}
    done = kept.fill(journal, read_journal(journal), asked, lambda row: ask(client, model, row), asdict, parallel)
    return [replace(done[row.key], source=row.source, label=row.label) for row in rows if row.key in done]


def rows_of(measure: Measure) -> list[Row]:
    """Return the rows that a measure of the signal scores; requests have no response.

    Raises:
        ValueError: if a row cannot be read, or none is left.
    """
    label, field = (1, "harmful_response") if measure.kind == "onsets" else (measure.label, None)
    rows = [row for row in read(measure.data, label=label, response=field) if row.source.startswith(measure.source)]
    if measure.kind == "requests":
        rows = [replace(row, response=None) for row in rows]
    if not rows:
        kind = "row" if label is None else ("harmless row", "harmful row")[label]
        raise ValueError(f"{measure.data} holds no {kind} whose source begins with {measure.source!r}")
    rows = sample(rows, measure.n)
    if measure.kind != "requests" and (silent := [row for row in rows if not (row.response or "").strip()]):
        raise ValueError(f"{measure.data} holds no response to {silent[0].prompt[:60]!r}")
    return rows
