"""A checkpoint is fine-tuned, keeps its signal, and is attacked. The training itself is left out."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evaluation import tuning
from evaluation.__main__ import main
from evaluation.intervals import wilson
from model import adapter
from model.checkpoint import attach, load, save
from model.pretrained import Pretrained
from model.testing import byte_tokenizer, tiny_lm, write_tiny


def write_adapter(folder: Path) -> None:
    get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).save_pretrained(
        str(folder)
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    _, folder = write_tiny(tmp_path)
    write_adapter(folder / adapter.FOLDER)
    head, _, config = load(folder)
    found = adapter.fingerprint(folder / adapter.FOLDER)
    save(folder, head, replace(config, base=replace(config.base, adapter=found)))
    return folder


def test_what_was_trained_is_served_with_the_signal_as_it_was(checkpoint: Path, tmp_path: Path, monkeypatch, capsys):
    trained: list[list[str]] = []
    attacked: list[list[str]] = []

    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        trained.append(command)
        write_adapter(Path(next(word for word in command if word.startswith("output=")).removeprefix("output=")))
        return subprocess.CompletedProcess(command, 0)

    def evaluate(words: list[str]) -> int:
        attacked.append(words)
        folder = Path(words[words.index("--target") + 1].removeprefix("checkpoint:"))
        lm = attach(Pretrained("tiny", tiny_lm(), byte_tokenizer()), folder)
        before, after = load(checkpoint), load(folder)
        assert replace(after.config, base=before.config.base) == before.config
        assert all(torch.equal(a, b) for a, b in zip(before.head.parameters(), lm.head.parameters(), strict=True))
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        share = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 4}
        outcome = {"measure": "direct", "attack": "direct", "policy": "both sides block", "share": share}
        (out / "report.json").write_text(json.dumps({"outcomes": [outcome, outcome | {"share": None}]}))
        return 0

    monkeypatch.setattr("evaluation.tuning.subprocess.run", train)
    words = [
        "backdoor",
        "--checkpoint",
        str(checkpoint),
        "--model",
        "M",
        "--steps",
        "5",
        "10",
        "--set",
        "constraint.first=2",
        "optimiser.warmup_steps=0",
        "--out",
        str(tmp_path / "o"),
    ]
    assert tuning.main(words, evaluate) == 0
    assert [[word for word in command if word.startswith(("steps", "constraint"))] for command in trained] == [
        ["constraint=null", "steps=5"],
        ["constraint=null", "steps=10"],
        ["constraint={}", "steps=5", "constraint.first=2"],
        ["constraint={}", "steps=10", "constraint.first=2"],
    ]
    assert {f"adapter={checkpoint / 'adapter'}", "model=M", "attack_backdoor"} <= set(trained[0])
    assert all(command[-1] == "optimiser.warmup_steps=0" for command in trained)
    assert all(words[:2] == ["run", "tuned_backdoor"] for words in attacked)
    printed = capsys.readouterr().out
    write_adapter(checkpoint / adapter.FOLDER)  # another one: what was trained on the first is not taken for its own
    with pytest.raises(ValueError, match="another kind"):
        tuning.main(words, evaluate)
    assert "| backdoor-plain-5 | direct | direct | both sides block | 4 | 25.0% [10.0%, 50.0%] |" in printed
    assert printed.count("| backdoor-constrained-10 |") == 1
    assert printed.startswith("With constraint.first=2 optimiser.warmup_steps=0.")
    assert printed == (tmp_path / "o" / "backdoor.md").read_text()


def test_one_training_is_attacked_after_every_so_many_of_its_steps(
    checkpoint: Path, tmp_path: Path, monkeypatch, capsys
):
    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert {"copy_steps=5", "steps=15"} <= set(command)
        (output,) = [Path(word.removeprefix("output=")) for word in command if word.startswith("output=")]
        copies = output.parent / "training" / "trainer-0" / "steps"
        for step in ("5", "10"):
            write_adapter(copies / step)
        write_adapter(output)
        shutil.copytree(output, copies / "15")
        return subprocess.CompletedProcess(command, 0)

    def evaluate(words: list[str]) -> int:
        assert words[1] == "mine"
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        found = load(Path(words[words.index("--target") + 1].removeprefix("checkpoint:"))).config.base.adapter
        share = {"value": 0.25, "low": 0.1, "high": 0.5, "n": 4}
        outcome = {"measure": "direct", "attack": found[:6], "policy": "both", "share": share}
        (out / "report.json").write_text(json.dumps({"outcomes": [outcome]}))
        return 0

    monkeypatch.setattr("evaluation.tuning.subprocess.run", train)
    words = ["harmful", "--checkpoint", str(checkpoint), "--objective", "plain", "--steps", "15", "--every", "5"]
    assert tuning.main([*words, "--suite", "mine", "--out", str(tmp_path / "o")], evaluate) == 0
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == [f"| harmful-plain-15{step}" for step in ("-step-5", "-step-10", "")]
    assert len({row[2] for row in rows}) == 3


def test_a_training_that_was_interrupted_goes_on_as_it_was_asked_for_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch
):
    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        (run,) = [Path(word.removeprefix("run=")) for word in command if word.startswith("run=")]
        write_adapter(run / "trainer-0" / "steps" / "5")
        raise KeyboardInterrupt

    monkeypatch.setattr("evaluation.tuning.subprocess.run", train)
    words = ["harmful", "--checkpoint", str(checkpoint), "--objective", "plain", "--out", str(tmp_path / "o")]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tuning.main(words, lambda words: 0)
    with pytest.raises(ValueError, match="another kind"):
        tuning.main([*words, "--every", "5"], lambda words: 0)


@pytest.mark.parametrize("change", ["constraint={first: 2}", "steps=7", "output=elsewhere"])
def test_what_other_arguments_set_is_not_set_twice(checkpoint: Path, tmp_path: Path, change: str):
    words = ["harmful", "--checkpoint", str(checkpoint), "--set", change, "--out", str(tmp_path / "o")]
    with pytest.raises(ValueError, match="are set by --objective, --steps and the other arguments"):
        tuning.main(words, lambda words: 0)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("task", ["gsm8k", "sql"])
def test_a_harmless_task_is_attacked_and_scored_once(checkpoint: Path, tmp_path: Path, monkeypatch, capsys, task: str):
    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert f"attack_{task}" in command
        write_adapter(Path(next(word for word in command if word.startswith("output=")).removeprefix("output=")))
        return subprocess.CompletedProcess(command, 0)

    def evaluate(words: list[str]) -> int:
        assert words[1] == "tuned"
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps({"outcomes": []}))
        return 0

    scored: list[tuple[object, ...]] = []
    monkeypatch.setattr("evaluation.tuning.subprocess.run", train)
    monkeypatch.setattr(
        "evaluation.tuning.tasks.of_tuned", lambda *words: scored.append(words) or {"accuracy": wilson(1, 4)}
    )
    words = [task, "--checkpoint", str(checkpoint), "--model", "M", "--train-data", "some/train", "--out"]
    for _ in range(2):
        assert tuning.main([*words, str(tmp_path / "o")], evaluate) == 0
    plain, constrained = scored
    tuned = tmp_path / "o" / f"{task}-plain" / "adapter"
    assert plain == (task, "M", tuned, Path(f"some/train/../finetune/{task}_test.jsonl"))
    assert constrained[2] == tmp_path / "o" / f"{task}-constrained" / "adapter"
    printed = capsys.readouterr().out
    assert printed.count(f"| {task}-plain | {task} | accuracy | none | 4 | 25.0% [4.6%, 69.9%] |") == 2


def test_a_training_that_fails_says_why(checkpoint: Path, tmp_path: Path, capsys):
    words = [
        "tune",
        "harmful",
        "--checkpoint",
        str(checkpoint),
        "--train-data",
        "nowhere",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 1
    assert "the training failed: ballast-train: nowhere/triplets.jsonl does not exist" in capsys.readouterr().err
    assert main([*words, "--set", "seed=1"]) == 1  # nothing was trained: another recipe may take its place
    assert "nowhere/triplets.jsonl does not exist" in capsys.readouterr().err


def test_a_checkpoint_without_an_adapter_is_trained_from_its_model_on(tmp_path: Path, monkeypatch):
    _, folder = write_tiny(tmp_path)

    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        assert "adapter=null" in command
        write_adapter(Path(next(word for word in command if word.startswith("output=")).removeprefix("output=")))
        return subprocess.CompletedProcess(command, 0)

    def evaluate(words: list[str]) -> int:
        made = load(Path(words[words.index("--target") + 1].removeprefix("checkpoint:")))
        assert made.config.base.adapter
        assert replace(made.config, base=load(folder).config.base) == load(folder).config
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        (out / "report.json").write_text(json.dumps({"outcomes": []}))
        return 0

    monkeypatch.setattr("evaluation.tuning.subprocess.run", train)
    words = ["harmful", "--checkpoint", str(folder), "--objective", "plain", "--out", str(tmp_path / "o")]
    assert tuning.main(words, evaluate) == 0
