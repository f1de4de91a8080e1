"""Which rows a measure scores, and what an answer that is none comes to."""

import json
from pathlib import Path

import pytest

from evaluation import scores
from evaluation.client import connect
from evaluation.suite import Measure


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "a", "response": "x", "harmful": 1, "source": "One (MIT)"},
            {"prompt": "b", "response": "y", "harmful": 0, "source": "Two (MIT)"},
        ],
    )


def test_requests_are_scored_without_their_responses(rows: Path):
    assert {(row.prompt, row.response, row.label) for row in scores.rows_of(Measure("requests", rows))} == {
        ("a", None, 1),
        ("b", None, 0),
    }
    (row,) = scores.rows_of(Measure("responses", rows, source="One"))
    assert (row.prompt, row.response) == ("a", "x")
    (row,) = scores.rows_of(Measure("requests", rows, label=0))
    assert row.prompt == "b"
    assert len(scores.rows_of(Measure("requests", rows, n=1))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "Three"}, "holds no row whose source begins with 'Three'"),
        ({"source": "One", "label": 0}, "holds no harmless row whose source begins with 'One'"),
    ],
)
def test_a_measure_without_rows_says_of_what(rows: Path, changes, message: str):
    with pytest.raises(ValueError, match=message):
        scores.rows_of(Measure("requests", rows, **changes))


@pytest.mark.parametrize("said", [{}, {"response": ""}, {"response": " \n"}])
def test_responses_must_have_one(tmp_path: Path, said: dict[str, str]):
    path = write(tmp_path / "bare.jsonl", [{"prompt": "a", "harmful": 1, **said}])
    with pytest.raises(ValueError, match="holds no response to 'a'"):
        scores.rows_of(Measure("responses", path))


@pytest.mark.parametrize("answer", [{}, {"request_risk": 0.5, "thresholds": {}}, {"request_risk": 0.5}])
def test_another_kind_of_answer_is_one_line(stub, rows: Path, tmp_path: Path, answer):
    server = connect(stub(lambda body: answer).url)
    assert not scores.can_score(*server)
    with pytest.raises(ValueError, match="does not answer /safety/score as this version does"):
        scores.score_all(*server, scores.rows_of(Measure("requests", rows)), tmp_path / "journal.jsonl")


@pytest.mark.parametrize(("status", "code"), [(400, "context_length_exceeded"), (500, "head_failed")])
def test_a_row_that_the_server_cannot_score_has_no_score_and_is_asked_for_again(
    stub, rows: Path, tmp_path: Path, status: int, code: str
):
    thresholds = {side: {"block": 0.8, "flag": 0.5} for side in ("request", "response")} | {"patience": 3}

    def answer(body):
        if body["messages"][0]["content"] == "a":
            return {"error": {"message": "no judgement", "code": code}}
        return {"request_risk": 0.5, "thresholds": thresholds}

    server = stub(answer)
    server.status_of = lambda body: status if "error" in body else 200
    client, model = connect(server.url)
    client = client.with_options(max_retries=0)
    found = [
        scores.score_all(client, model, scores.rows_of(Measure("requests", rows)), tmp_path / "journal.jsonl")
        for _ in range(2)
    ]
    assert [[score.source for score in some] for some in found] == [["Two"], ["Two"]]
    assert [body["messages"][0]["content"] for body in server.asked].count("a") == 2
    assert [body["messages"][0]["content"] for body in server.asked].count("b") == 1


@pytest.mark.parametrize("line", ["5", "[]", '{"key": "k"}', "no JSON"])
def test_a_broken_journal_is_named(tmp_path: Path, line: str):
    path = tmp_path / "journal.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"journal\.jsonl, line 1: not a score of this version"):
        scores.read_journal(path)
