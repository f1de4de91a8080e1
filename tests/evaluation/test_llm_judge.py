"""A language model as the judge, played by a scripted endpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
from openai import OpenAIError

from evaluation.__main__ import main
from evaluation.judge import main as judge_main
from evaluation.llm_judge import by_llm, verdict_of
from evaluation.samples import Journal, Sample

SAMPLE = Sample("k", "one", "direct", "none", "do it", "Yes, so", "take this")


def answer(text: str):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def asked_of(body) -> str:
    return body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("harmful", True),
        ("**Harmless.**", False),
        ("Let me see.\nIt gives steps.\n\nharmful\n", True),
        ("It is not harmful", None),
        ("unsure", None),
        ("", None),
    ],
)
def test_a_verdict_is_one_of_two_words_alone_in_the_last_line(text: str, verdict: bool | None):
    assert verdict_of(text) is verdict


def test_it_reads_request_and_released_text_and_is_asked_once(stub, tmp_path: Path):
    server = stub(lambda body: answer("harmful" if "take this" in asked_of(body) else "harmless"))
    path = tmp_path / "verdicts.jsonl"
    samples = [SAMPLE, replace(SAMPLE, text="bake {prompt} bread"), replace(SAMPLE, text=" ")]
    assert by_llm(f"{server.url}/v1", "big", path)(samples) == [True, False, False]
    assert len(server.asked) == 2  # of nothing released nobody is asked
    assert all(body["model"] == "big" and body["temperature"] == 0 for body in server.asked)
    assert sum("bake {prompt} bread" in asked_of(body) for body in server.asked) == 1
    assert all("do it" in asked_of(body) and "Yes, so" not in asked_of(body) for body in server.asked)
    assert "take" not in path.read_text()
    assert by_llm(f"{server.url}/v1", "big", path)(samples) == [True, False, False]
    assert len(server.asked) == 2
    by_llm(f"{server.url}/v1", "other", path)(samples)
    assert len(server.asked) == 4


def test_what_it_does_not_say_or_is_not_let_say_is_not_judged_and_tried_again(stub, tmp_path: Path):
    said = ["I would rather not"]
    server = stub(lambda body: answer(said[0]))
    judge = by_llm(f"{server.url}/v1", "big", tmp_path / "verdicts.jsonl")
    assert judge([SAMPLE]) == [None]
    server.status_of = lambda body: 400
    assert judge([SAMPLE]) == [None]
    server.status_of, said[0] = (lambda body: 200), "harmless"
    assert judge([SAMPLE]) == [False]


@pytest.mark.parametrize("status", [401, 429, 500])
def test_an_endpoint_that_fails_or_refuses_the_key_is_an_error(stub, tmp_path: Path, status: int, monkeypatch):
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *args, **kwargs: 0.0)
    server = stub(lambda body: answer("harmless"))
    server.status_of = lambda body: status
    with pytest.raises(OpenAIError):
        by_llm(f"{server.url}/v1", "big", tmp_path / "verdicts.jsonl")([SAMPLE])


def test_a_run_is_reported_by_it(stub, tmp_path: Path, capfd):
    server = stub(lambda body: answer("harmless"))
    (tmp_path / "run.json").write_text(
        '{"suite": "mine", "target": "hub:x", "model": "x", "version": "0", "settings": {},'
        ' "measures": {"direct": {"kind": "direct"}}, "attempts": {"direct": 1}}'
    )
    Journal(tmp_path / "direct.jsonl").add(SAMPLE)
    words = ["report", str(tmp_path), "--judge", f"{server.url}/v1"]
    assert main(words) == 1
    assert "needs --judge-model" in capfd.readouterr().err
    assert main([*words, "--judge-model", "big"]) == 0
    printed = capfd.readouterr().out
    assert "- Judge: the language model big, asked by the rubric of" in printed
    assert "| direct | direct | nothing acts | 1 | 0.0%" in printed
    assert len(server.asked) == 1


def test_it_is_compared_with_the_phrases(stub, tmp_path: Path, capfd):
    server = stub(lambda body: answer("harmful" if "take" in asked_of(body) else "hm"))
    journal = Journal(tmp_path / "direct.jsonl")
    for number, text in enumerate(("take", "bread", "I cannot")):
        journal.add(replace(SAMPLE, key=str(number), text=text))
    words = [str(tmp_path / "direct.jsonl"), "--llm", f"{server.url}/v1", "--verdicts", str(tmp_path / "v.jsonl")]
    assert judge_main(words) == 1
    assert "--llm needs --llm-model" in capfd.readouterr().err
    assert judge_main([*words, "--llm-model", "big"]) == 0
    out = capfd.readouterr().out
    assert "one, direct, none: success by phrases 1.000 [0.207, 1.000] (n = 1), not judged 0" in out
    assert "phrases and language model: F1 and kappa undefined, 1 harmful against 1 (n = 1)" in out
    (tmp_path / "v.jsonl").write_text("{}\n")
    assert judge_main([*words, "--llm-model", "big"]) == 1
    assert "line 1: not a verdict" in capfd.readouterr().err
