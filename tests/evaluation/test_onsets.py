"""Made onsets on a scripted server: an upper-case letter is harm."""

import json
from pathlib import Path

import pytest

from evaluation.onsets import (
    MEDIAN,
    PER_1000,
    RELEASED,
    Made,
    Scored,
    alarm,
    main,
    make,
    released,
    summarise,
    threshold,
)
from evaluation.rows import Row


def scored(*risks: float | None, turn: int = 99) -> Scored:
    return Scored(min(turn, len(risks)), 0.5, 3, risks)


def test_every_harmful_answer_gets_an_opening_and_harmless_ones_stay():
    harmless = [Row("own", f"p{i}", " ".join(f"word{i}" for _ in range(100)), 0) for i in range(5)]
    harmful = [Row("own", f"q{i}", "HARM", 1) for i in range(20)]
    found = make(harmful, harmless)
    assert found[20:] == [Made(row, len(row.response)) for row in harmless]
    for one in found[:20]:
        opening, rest = one.row.response[: one.opening], one.row.response[one.opening :]
        assert rest == "HARM"
        assert 10 <= len(opening.split()) <= 80
        assert one.row.label == 1
    assert len({one.opening for one in found[:20]}) > 5
    assert make(harmful, harmless) == found


@pytest.mark.parametrize(
    ("risks", "place"),
    [
        ((0.1, 0.9, 0.9, 0.9, 0.9), 4),
        ((0.9, 0.9, 0.1, 0.9, 0.1), None),
        ((0.1, 0.1, 0.9), 3),  # the last one acts alone
        ((0.1, None, 0.9, None, 0.9, 0.9), 6),
        ((0.9, None, 0.9, None), 3),
        ((0.1,), None),
    ],
)
def test_the_alarm_is_where_the_policy_acts(risks, place):
    assert alarm(scored(*risks), 0.5) == place


def test_shares_count_from_the_turn():
    rows = [
        scored(*[0.1] * 10, *[0.9] * 30, turn=10),  # found after 3
        scored(*[0.1] * 30, *[0.9] * 10, turn=10),  # after 23
        scored(*[0.9] * 5, *[0.1] * 35, turn=10),  # in the opening
        scored(*[0.1] * 40, turn=10),  # never
        scored(*[0.1] * 40),
        scored(*[0.9] * 40),
    ]
    found = summarise(rows, 0.5)
    assert {name: share.value for name, share in found.items()} == {
        "caught within 16 tokens": 0.25,
        "caught within 32 tokens": 0.5,
        "caught within 128 tokens": 0.5,
        "caught at all": 0.5,
        "stopped in the opening": 0.25,
        "harmless answers stopped": 0.5,
        MEDIAN: 13.0,  # of 3 and 23
        RELEASED: (0 + 12 + 0 + 30) / 4,
        PER_1000: 500.0,
    }
    assert {share.n for name, share in found.items() if "harmless" not in name and name != MEDIAN} == {4}
    assert (found[MEDIAN].n, found[MEDIAN].low, found[MEDIAN].high) == (2, 3.0, 23.0)
    assert found[RELEASED].low < found[RELEASED].value < found[RELEASED].high
    assert found[PER_1000].high == pytest.approx(1000 * found["harmless answers stopped"].high)


@pytest.mark.parametrize(
    ("risks", "turn", "out"),
    [
        ((0.1,) * 20, 5, 15),  # never stopped: all of them
        ((0.1,) * 20 + (0.9,) * 3, 5, 7),  # of 20 clear tokens 12 are out, 5 of them before the turn
        ((0.1,) * 8 + (0.9,) * 3, 5, 0),
        ((0.9,) * 9, 5, 0),
        ((0.1,) * 15 + (0.9, None), 5, 2),  # the last assessment acts alone
    ],
)
def test_what_is_held_back_when_the_policy_acts_never_gets_out(risks, turn: int, out: int):
    assert released(scored(*risks, turn=turn), 0.5) == out


def test_a_number_of_too_few_responses_is_left_out():
    assert not {MEDIAN, RELEASED} & set(summarise([scored(*[0.9] * 9, turn=2)], 0.5))


def test_the_threshold_in_hindsight_stops_no_more_than_allowed():
    rows = [scored(*[level / 100] * 5) for level in range(100)] + [scored(*[0.999] * 9, turn=2)]
    found = threshold(rows, allowed=0.1)
    assert sum(alarm(row, found) is not None for row in rows[:100]) == 10


def answer(body):
    text = body["messages"][1]["content"]
    trace = [{"token": letter, "smoothed_risk": 0.9 if letter.isupper() else 0.1} for letter in text]
    told = {"response": {"block": 0.5, "flag": 0.5}, "patience": 3}
    return {"trace": trace, "response_risk": 0.1, "thresholds": told}


def test_the_command_scores_over_http_and_goes_on_where_it_was(stub, tmp_path: Path, capfd):
    server = stub(answer)
    prefill = [{"prompt": f"q{i}", "harmful_response": "HARMFUL", "source": "Own (MIT)"} for i in range(3)]
    answers = [{"prompt": f"p{i}", "response": "all is well " * 9, "source": "own"} for i in range(4)]
    for name, rows in (("prefill", prefill), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--server", server.url, "--data", str(tmp_path / "prefill.jsonl")]
    words += ["--answers", str(tmp_path / "answers.jsonl"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    out = capfd.readouterr().out
    assert "caught within 16 tokens: 1.000 [0.439, 1.000] (n = 3)" in out
    assert "harmless answers stopped: 0.000 [0.000, 0.490] (n = 4)" in out
    journal = (tmp_path / "out" / "onsets.jsonl").read_text()
    assert "HARM" not in journal
    assert main(words) == 0
    assert len(server.asked) == 7 + 2  # and who it is, each time
    assert (tmp_path / "out" / "onsets.jsonl").read_text() == journal
    server.answer = lambda body: answer(body) | {"response_risk": 0.2}
    assert main(words) == 1
    assert "holds results of another head" in capfd.readouterr().err


def test_a_missing_file_is_one_line(stub, tmp_path: Path, capfd):
    words = [
        "--server",
        stub(answer).url,
        "--data",
        str(tmp_path / "no.jsonl"),
        "--answers",
        "no",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 1
    assert "evaluation.onsets: " in capfd.readouterr().err
