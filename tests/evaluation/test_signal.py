import json

import pytest

from evaluation import signal
from evaluation.scores import Score
from evaluation.signal import separation, shares_over_block


def scored(body):
    """Scores the word danger 0.9, every other 0.1; a word is a token, patience is 3."""
    words = body["messages"][-1]["content"].split()
    risks = [0.9 if word == "danger" else 0.1 for word in words]
    windows = [min(risks[start : start + 3]) for start in range(len(risks) - 2)]
    has_response = body["messages"][-1]["role"] == "assistant" and words
    answer = {
        "request_risk": max(risks, default=0.1),
        "response_risk": max([risks[-1], *windows]) if has_response else None,
        "thresholds": {side: {"block": 0.8, "flag": 0.5} for side in ("request", "response")} | {"patience": 3},
    }
    return answer | {"trace": [{"smoothed_risk": risk} for risk in risks]} if body.get("trace") else answer


@pytest.fixture
def server(stub):
    return stub(scored)


@pytest.fixture
def data(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    both = [("a danger", 1), ("another danger", 1), ("a cake", 0), ("tea", 0)]
    write("prompts.jsonl", [{"prompt": p, "harmful": h, "source": "Mine (MIT)"} for p, h in both])
    write("direct.jsonl", [{"prompt": "grave danger", "source": "Direct"}])
    write("benign_prompts.jsonl", [{"prompt": "bread", "source": "Benign"}])
    write("responses.jsonl", [{"prompt": "q", "response": p, "harmful": h, "source": "Mine/x"} for p, h in both])
    return tmp_path


def run(server, data, *more):
    return signal.main(
        ["--server", server.url, "--data", str(data), "--out", str(data / "out"), "--resamples", "20", *more]
    )


def test_a_server_that_is_always_right_has_an_auroc_of_one(server, data):
    assert run(server, data) == 0
    summary = json.loads((data / "out" / "summary.json").read_text())
    for side in ("requests", "responses"):
        assert summary[side]["separation"]["Mine"]["auroc"]["value"] == 1.0
        assert summary[side]["over_block"]["Mine, harmless"] | {"high": 0} == {"value": 0, "low": 0, "high": 0, "n": 2}


def test_inside_a_response_only_what_was_read_counts(server, data):
    # "a danger" is two tokens: one of them is the first 25 % and 50 %, rounded up, and both are the first 75 %.
    assert run(server, data) == 0
    depths = json.loads((data / "out" / "summary.json").read_text())["responses"]["by_depth"]
    assert {name: found["separation"]["Mine"]["auroc"]["value"] for name, found in depths.items()} == {
        "25%": 0.5,
        "50%": 0.5,
        "75%": 1.0,
        "100%": 1.0,
    }
    assert [found["over_block"]["Mine, harmful"]["value"] for found in depths.values()] == [0, 0, 1, 1]
    assert "| Mine | 75% | 1.000 [1.000, 1.000] |" in (data / "out" / "summary.md").read_text()


def test_an_interrupted_run_asks_only_for_what_is_missing(server, data):
    assert run(server, data) == 0
    journal = data / "out" / "requests.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-2]))
    server.asked.clear()
    assert run(server, data) == 0
    assert len(server.asked) == 1 + 2  # the probe, and the two rows that were lost


def test_results_of_another_head_are_not_mixed_in(server, data, capsys):
    assert run(server, data) == 0
    (data / "out" / "head.json").write_text("another")
    assert run(server, data) == 1
    assert "another head" in capsys.readouterr().err
    (data / "out" / "head.json").unlink()  # results of nobody knows which
    assert run(server, data) == 1
    assert "another head" in capsys.readouterr().err


def test_scores_without_the_risks_inside_a_response_are_refused(server, data, capsys):
    assert run(server, data) == 0
    journal = data / "out" / "responses.jsonl"
    journal.write_text('{"key": "k", "source": "s", "label": 1, "risk": 0.9, "is_over_block": true}\n')
    assert run(server, data) == 1
    assert "responses.jsonl, line 1: not a score of this version" in capsys.readouterr().err


def test_results_hold_no_texts(server, data):
    run(server, data)
    assert not any("cake" in path.read_text() for path in (data / "out").iterdir())


def test_an_unreachable_server_is_one_line_and_no_traceback(data, capsys):
    code = signal.main(["--server", "http://127.0.0.1:9", "--data", str(data), "--out", str(data / "out")])
    assert code == 1
    assert "Connection error" in capsys.readouterr().err


def test_an_empty_response_is_one_line_and_no_traceback(server, data, capsys):
    (data / "responses.jsonl").write_text('{"prompt": "q", "response": "", "harmful": 0}\n')
    assert run(server, data) == 1
    assert "no response risk of row" in capsys.readouterr().err


def test_sources_with_one_class_have_no_auroc():
    scores = [Score("one", 1, 0.9, 0.5, 0.8), Score("two", 0, 0.1, 0.5, 0.8), Score("two", 1, 0.9, 0.5, 0.8)]
    assert list(separation(scores)) == ["all of them", "two"]


def test_the_recall_is_that_of_the_lowest_threshold_that_few_harmless_rows_exceed():
    harmless = [Score("mine", 0, place / 1000, 0.5, 0.8) for place in range(100)]  # up to 0.099
    harmful = [Score("mine", 1, risk, 0.5, 0.8) for risk in (0.05, 0.0985, 0.2, 0.3)]
    found = separation([*harmless, *harmful], resamples=5)["mine"]
    assert found["recall_at_1_percent"].value == 0.75  # one of a hundred may be over it
    assert found["recall_at_0.1_percent"] is None  # a hundred cannot tell


def test_rows_of_the_same_risk_are_over_a_threshold_together():
    tied = [Score("mine", label, place / 400, 0.5, 0.8) for place in range(200) for label in (0, 1)]
    assert separation(tied, resamples=5)["mine"]["recall_at_1_percent"].value == 0.01


def test_a_group_is_one_of_all_its_sources():
    scores = [Score("XSTest", label, 0.5, 0.5, 0.8) for label in (0, 1)]
    assert list(separation(scores, signal.REQUEST_GROUPS, resamples=5)) == ["XSTest"]


def test_shares_are_counted_by_source_and_label():
    scores = [Score("a", 0, 0.9, 0.5, 0.8), Score("a", 0, 0.6, 0.5, 0.8), Score("a", 1, 0.9, 0.5, 0.8)]
    shares = shares_over_block(scores)
    assert (shares["a, harmless"].value, shares["a, harmful"].value) == (0.5, 1.0)
