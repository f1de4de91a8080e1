"""`ballast-train harden` takes the tiny model the whole way."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from model import checkpoint
from model.pretrained import load
from model.testing import ScriptedLM
from tests.training.tuning import joint
from training import recipe_file
from training.__main__ import main
from training.config import HeadRecipe
from training.errors import RecipeError, TrainingError
from training.harden import CHECK, check, harden
from training.harden_config import HardenRecipe
from training.tune_config import AnchorRecipe, TuneRecipe

ANCHORS: dict[str, Any] = {
    "output": "runs/anchors.jsonl",
    "dtype": "float32",
    "sources": {"instructions": {"path": "instructions.jsonl", "limit": 6}},
    "answers": {"max_tokens": 6},
}
SHORT: dict[str, Any] = {"benign": {"path": "benign_prompts.jsonl", "limit": 4}}


@pytest.fixture
def config(hiding: HeadRecipe, saved_model: Path, data: Path, tmp_path: Path) -> Path:
    """A recipe whose answers become the benign part of the signal's training."""
    signal = joint(saved_model, data, tmp_path, steps=1)
    signal.parts["benign"].sources["i"] = TypeAdapter(type(signal.parts["benign"].sources["i"])).validate_python(
        {"path": "runs/anchors.jsonl", "request_label": 0, "response_label": 0}
    )
    alpaca = replace(hiding.sources["alpaca"], without=("runs/short.jsonl",))
    recipe = replace(hiding, sources={**hiding.sources, "alpaca": alpaca}, head=replace(hiding.head, layers=()))
    found = {
        "model": "overwritten",
        "data": str(data),
        "device": "cpu",
        "output": str(tmp_path / "hardened"),
        "run": str(tmp_path / "run"),
        "anchors": {
            "anchors": ANCHORS,
            "short": {**ANCHORS, "output": "runs/short.jsonl", "sources": SHORT, "answers": {"max_tokens": 2}},
        },
        "signal": TypeAdapter(TuneRecipe).dump_python(signal, mode="json"),
        "head": TypeAdapter(HeadRecipe).dump_python(recipe, mode="json"),
    }
    path = tmp_path / "harden.yaml"
    path.write_text(yaml.safe_dump(found))
    return path


def test_the_shipped_recipe_reads_only_answers_that_it_writes():
    recipe = recipe_file.load(HardenRecipe, "harden")
    written = {anchors.output for anchors in recipe.anchors.values()}
    parts = recipe.signal.parts.values()
    read = {source.path for part in parts for source in part.sources.values()}
    read |= {part.onset.openings.path for part in parts if part.onset is not None}
    read |= {path for source in recipe.head.sources.values() for path in source.without}
    assert {path for path in read if path.startswith("runs/")} == written


def test_a_model_goes_the_whole_way_and_again_without_doing_anything_twice(
    config: Path, saved_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    words = ["harden", "--config", str(config), "--model", str(saved_model)]
    assert main(words) == 0
    lm = checkpoint.attach(load(str(saved_model), dtype=torch.float32), tmp_path / "hardened")
    assert (lm.head is None, lm.cls is None) == (False, False)
    assert lm.head.config.layers == (0, 1, 2, -1)  # spread over a model of three layers
    assert lm.head.config.reads_query
    assert lm.config.base.adapter
    answers = (tmp_path / "run" / "anchors.jsonl").read_text()
    assert answers.count("\n") >= 1
    err = capfd.readouterr().err
    assert "quick check: " in err
    assert json.loads((tmp_path / "run" / "check.json").read_text())["num_malicious"] == 6
    assert f"wrote {tmp_path / 'hardened'}; serve it with BALLAST_MODEL={saved_model}" in err
    first = (tmp_path / "hardened" / checkpoint.CONFIG_FILE).read_text()
    assert main(words) == 0
    assert (tmp_path / "hardened" / checkpoint.CONFIG_FILE).read_text() == first
    assert (tmp_path / "run" / "anchors.jsonl").read_text() == answers


def test_the_quick_check_counts_what_the_policy_acts_on():
    # In the scripted model an upper-case letter is harm, and every sentence begins with one.
    texts = yaml.safe_load(CHECK.read_text())
    found = check(ScriptedLM("fine"))
    assert (found.num_benign_acted_on, found.num_malicious_acted_on) == (found.num_benign, found.num_malicious)
    assert (found.num_benign, found.num_malicious) == (len(texts["benign"]), len(texts["malicious"]))
    assert str(found) == "quick check: 6 of 6 malicious requests refused, 6 of 6 benign ones"


def test_the_quick_check_counts_nothing_that_the_policy_lets_pass(monkeypatch):
    texts = yaml.safe_load(CHECK.read_text())
    lower = {kind: [text.lower() for text in found] for kind, found in texts.items()}
    monkeypatch.setattr("training.harden.yaml.safe_load", lambda text: lower | {"benign": texts["benign"]})
    found = check(ScriptedLM("fine"))
    assert (found.num_benign_acted_on, found.num_malicious_acted_on) == (6, 0)


def test_the_shipped_recipe_is_made_of_those_of_its_steps():
    found = recipe_file.load(HardenRecipe, "harden", ["signal.steps=7", "head.seed=3"])
    assert found.anchors["anchors"] == recipe_file.load(AnchorRecipe, "anchors")
    assert found.signal.adapter is None
    assert found.signal.steps == 7
    assert found.signal.parts == recipe_file.load(TuneRecipe, "deepened_signal_balanced").parts
    off = ["seed=3", "acting.redraw_share=null", "head.layers=[]"]
    assert found.head == recipe_file.load(HeadRecipe, "head_deepened_signal", off)


def test_two_sets_of_anchors_do_not_write_one_file():
    with pytest.raises(
        RecipeError, match=r"anchors: each set needs an output of its own, got \['runs/anchors.jsonl', "
    ):
        recipe_file.load(HardenRecipe, "harden", ["anchors.short_anchors.output=runs/anchors.jsonl"])


def test_an_unknown_key_of_a_step_is_named():
    with pytest.raises(RecipeError, match=r"unknown recipe key 'signal.stebs'; did you mean 'signal.steps'"):
        recipe_file.load(HardenRecipe, "harden", ["signal.stebs=7"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("head.sources.alpaca.without=[nowhere.jsonl]", "nowhere.jsonl"),
        ("signal.parts.refusals.sources.t.path=nowhere.jsonl", "nowhere.jsonl"),
        ("signal.parts.onsets.onset.openings.path=nowhere.jsonl", "nowhere.jsonl"),
        ("signal.parts.refusals.sources.t.match=Nobody", "no row is left in the part 'refusals'"),
        ("signal.parts.refusals.sources.t.path=unclear.jsonl", "set recipe key licence"),
        ("head.sources.instructions.path=short.jsonl", "no harmless text to put around requests"),
    ],
)
def test_what_would_end_a_later_step_ends_it_before_the_first(
    config: Path, saved_model: Path, data: Path, monkeypatch, change: str, message: str
):
    monkeypatch.setattr("training.harden.write_anchors", None)
    (data / "unclear.jsonl").write_text(
        (data / "triplets.jsonl").read_text().replace("Own sentences (MIT)", "Own sentences (GPL-3.0)")
    )
    (data / "short.jsonl").write_text('{"prompt": "Hello?", "response": "Hello.", "source": "Own (MIT)"}\n' * 9)
    recipe = recipe_file.load(HardenRecipe, str(config), [f"model={saved_model}", change])
    with pytest.raises(TrainingError, match=message):
        harden(recipe, "")
