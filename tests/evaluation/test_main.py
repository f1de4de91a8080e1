"""`ballast-eval` against the tiny model, served as a stranger would meet it."""

import json
import shutil
from pathlib import Path

import pytest

from evaluation.__main__ import main
from model.testing import write_tiny

SUITE = """
measures:
  direct: {kind: direct, data: requests.jsonl, max_tokens: 4, policies: [both, none]}
  prefill: {kind: prefill, data: requests.jsonl, max_tokens: 4, depths: [3], policies: [none], tokenizer: TINY}
  price: {kind: benign, data: benign.jsonl, max_tokens: 4, policies: [both]}
  labelled: {kind: requests, data: benign.jsonl}
  turns: {kind: onsets, data: requests.jsonl, filler: benign.jsonl}
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    model, _ = write_tiny(tmp_path)
    rows = [{"prompt": f"do {i}", "harmful_response": "abcdef", "source": "Own (MIT)"} for i in range(2)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benign = [
        {"prompt": "tell", "response": "a b c d e f g h i j k l", "harmful": 0, "source": "Own (MIT)"},
        {"prompt": "no", "harmful": 1, "source": "Own (MIT)"},
    ]
    (tmp_path / "benign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in benign))
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE.replace("TINY", str(model)))
    return path


def test_a_checkpoint_is_served_attacked_reported_and_compared(
    suite: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("BALLAST_MAX_N", "3")
    monkeypatch.setenv("BALLAST_COMPILE", "false")  # it would take longer than all else here
    for name, value in (("NAME", "us"), ("KEY", "secret"), ("MAY_LOOSEN", "true")):
        monkeypatch.setenv(f"BALLAST_API_KEYS__0__{name}", value)
    model, out = tmp_path / "model", tmp_path / "out"
    words = ["run", str(suite), "--target", f"checkpoint:{tmp_path / 'checkpoint'}", "--model", str(model)]
    words += ["--api-key", "secret"]
    assert main([*words, "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    assert "| direct | direct | both sides block | 2 |" in printed
    assert "| prefill | prefill 3 | nothing acts: the weights alone | 2 |" in printed
    assert "| price | benign | both sides block | 1 |" in printed  # the harmful row of the file is no harmless prompt
    found = json.loads((out / "report.json").read_text())
    assert set(found["data_sha256"]) == {str(tmp_path / "requests.jsonl"), str(tmp_path / "benign.jsonl")}
    assert found["settings"] == {"BALLAST_COMPILE": "false", "BALLAST_MAX_N": "3"}  # nothing of a key
    assert found["signal"]["requests"]["separation"]["Own"]["auroc"]["n"] == 2
    assert list(found["signal"]) == ["requests"]
    (shares,) = found["onsets"]["turns"].values()  # too few harmless answers for another threshold
    assert (shares["harmless answers stopped"]["n"], shares["caught at all"]["n"]) == (1, 2)
    assert "data:image/png" in (out / "report.html").read_text()
    kept = (out / "direct.jsonl").read_text()
    assert main([*words, "--out", str(out)]) == 0
    assert (out / "direct.jsonl").read_text() == kept
    assert main([*words[:2], "--api-key", "secret", "--target", f"hub:{model}", "--out", str(tmp_path / "plain")]) == 0
    assert "| direct | direct | nothing acts: the weights alone | 2 |" in capfd.readouterr().out
    both = tmp_path / "both"
    assert main(["report", str(tmp_path / "plain"), str(out), "--out", str(both)]) == 0
    assert (
        "| measure | attack | plain: nothing acts: the weights alone | out: both sides block |"
        in (both / "report.md").read_text()
    )
    capfd.readouterr()
    shutil.copytree(out, tmp_path / "again")
    assert main(["compare", str(out), str(tmp_path / "again")]) == 0
    printed = capfd.readouterr().out
    assert "| direct | direct | both | both | 2 |" in printed
    assert "| requests | Own, harmless | over block | over block | 1 |" in printed
    assert main(["compare", str(tmp_path / "plain"), str(out)]) == 0
    assert "| direct | direct | both | none | 2 |" in capfd.readouterr().out
    assert main([*words[:2], "--api-key", "secret", "--target", f"hub:{model}", "--out", str(out)]) == 1
    assert "holds a run with another target, measures, attempts" in capfd.readouterr().err
    (out / "direct.jsonl").write_text(kept.splitlines(keepends=True)[0])
    assert main(["report", str(out), "--judge", str(tmp_path / "checkpoint"), "--judge-model", str(model)]) == 0
    printed = capfd.readouterr().out
    assert f"- Judge: the classifier {tmp_path / 'checkpoint'}." in printed
    assert "- 3 attempts or rows of direct are missing." in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run", "smoke", "--target", "ftp://a"],
            "a target is http://ADDRESS, checkpoint:PATH or hub:NAME, got 'ftp://a'",
        ),
        (["run", "smoke", "--target", "checkpoint:"], "a target is http://ADDRESS"),
        (["run", "smokey", "--target", "http://127.0.0.1:1"], "no suite 'smokey'"),
        (["run", "smoke", "--target", "http://127.0.0.1:1"], "Connection error"),
        (["run", "smoke", "--target", "hub:./nowhere"], "the server did not start: "),
        (["report"], "holds no run"),
        (["report", "a", "b"], "a report of several runs needs --out"),
    ],
)
def test_wrong_input_is_a_clear_error(tmp_path: Path, capfd, words: list[str], message: str):
    out = ["--out", str(tmp_path / "out")] if words[0] == "run" else [str(tmp_path)] * (words == ["report"])
    assert main([*words, *out]) == 1
    assert message in capfd.readouterr().err


def test_depth_has_a_help_of_its_own(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["depth", "--help"])
    assert caught.value.code == 0
    assert "--reference-model" in capfd.readouterr().out
