"""`ballast-train head` on the tiny model, from sentences to a checkpoint that the server can load."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from model import checkpoint, cls_signal
from model.chat import Message
from model.pretrained import Pretrained, load
from model.scoring import score
from model.testing import tiny_guarded_lm, tiny_lm
from tests.training.tuning import joint
from training import onsets, recipe_file
from training.__main__ import main
from training.config import Head, HeadRecipe
from training.errors import DataError, RecipeError
from training.licences import licence_beside
from training.run import _rows, calibrate_checkpoint, train_head
from training.subject import load_subject
from training.tune import tune


@pytest.fixture
def config(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    recipe_file.dump(recipe, path)
    return path


@pytest.mark.draws
def test_the_command_writes_a_checkpoint_that_loads(config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["head", "--config", str(config), "name=trial"]) == 0

    lm = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), tmp_path / "checkpoint")
    trace = score(lm, lm.chat.encode([Message("user", "Hello"), Message("assistant", "Hi.")], continue_final=True))
    assert len(trace.assessments) == 3
    assert lm.config is not None
    assert lm.config.onset <= lm.config.response.block
    assert lm.config.licence == "CC-BY-NC-SA-4.0"
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert "ballast-train head --config" in card
    assert "CC-BY-NC-SA-4.0 applies to these weights" in card
    numbers = json.loads((tmp_path / "checkpoint" / "metrics.json").read_text())
    assert set(numbers["data_sha256"]) == {p.name for p in (tmp_path / "data").iterdir()}
    plots = {p.name for p in (tmp_path / "checkpoint" / "plots").iterdir()}
    assert plots == {"loss.png", "scores.png", "roc.png", "reliability.png"}
    assert recipe_file.load(HeadRecipe, str(tmp_path / "run" / "recipe.yaml")).name == "trial"
    assert "Traceback" not in capfd.readouterr().err


class Interrupt(TrainerCallback):
    """Stops the run in the middle of an epoch, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.load(folder).head.state_dict())


def test_a_model_whose_template_knows_no_system_message_is_given_none(recipe: HeadRecipe, caplog):
    lm = tiny_guarded_lm()
    lm.tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + str(
        lm.tokenizer.chat_template
    )
    always = replace(recipe, augment=replace(recipe.augment, system=1.0))
    rows = _rows(always, Pretrained("tiny", lm.model, lm.tokenizer))
    assert rows
    assert not any(message.role == "system" for row in rows for message in row.messages)
    assert "takes no system message" in caplog.text


def test_the_label_of_an_onset_speaks_of_what_comes_after_its_opening(recipe: HeadRecipe, tiny: Pretrained):
    rows = _rows(replace(recipe, augment=replace(recipe.augment, onset=1.0)), tiny)
    harmful = [row for row in rows if row.group == onsets.GROUP and row.response_label]
    texts = {row.response.encode() for row in rows if row.group != onsets.GROUP and row.response}
    assert harmful
    assert all(row.response.encode()[row.opening_tokens + 1 :] in texts for row in harmful)  # a token is a byte here


def test_an_interrupted_run_ends_with_the_same_weights(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    train_head(recipe, "plain")
    other = replace(recipe, run=str(tmp_path / "other"), output=str(tmp_path / "resumed"))
    with pytest.raises(KeyboardInterrupt):
        train_head(other, "interrupted", [Interrupt(17)])
    assert not (tmp_path / "resumed" / checkpoint.CONFIG_FILE).exists()
    train_head(other, "resumed")

    plain, resumed = weights(tmp_path / "checkpoint"), weights(tmp_path / "resumed")
    assert all(torch.equal(plain[name], resumed[name]) for name in plain)


def test_a_finished_run_repeats_to_the_same_checkpoint(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    train_head(recipe, "once")
    first = (tmp_path / "checkpoint" / checkpoint.CONFIG_FILE).read_text()
    assert checkpoint.load(tmp_path / "checkpoint").config.base.weights == checkpoint.fingerprint_weights(tiny.model)
    train_head(recipe, "once")
    assert (tmp_path / "checkpoint" / checkpoint.CONFIG_FILE).read_text() == first


def test_without_resuming_a_run_starts_anew(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    train_head(recipe, "once")
    (folder,) = (tmp_path / "run").glob("trainer-*")
    (folder / "response" / "checkpoint-999").mkdir()
    train_head(replace(recipe, resume=False), "again")
    assert not (folder / "response" / "checkpoint-999").exists()


def test_a_permissive_run_says_so(recipe: HeadRecipe, tiny: Pretrained):
    bound = ("own_answers", "alpaca", "refusals")
    free = {name: source for name, source in recipe.sources.items() if name not in bound}
    folder = train_head(replace(recipe, sources=free, is_permissive_only=True), "permissive")
    assert checkpoint.load(folder).config.licence == "Apache-2.0"


def test_a_linear_head_on_two_layers_learns_capital_letters(recipe: HeadRecipe, tiny: Pretrained):
    """Malicious prompts of our sentences hold capitals, others do not: even a random model's states tell."""
    changed = replace(
        recipe, head=Head(layers=(0, -1), hidden=0), response_optimiser=replace(recipe.response_optimiser, epochs=8)
    )
    folder = train_head(changed, "plain")
    numbers = json.loads((folder / "metrics.json").read_text())
    losses = {
        side: [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        for side, history in numbers["history"].items()
    }
    assert (len(losses["request"]), len(losses["response"])) == (3, 8)
    assert all(one[-1] < one[0] for one in losses.values())
    assert checkpoint.load(folder).config.token_head.layers == (0, -1)


def test_weights_of_unclear_licence_are_refused(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    path = tmp_path / "data" / "prompts.jsonl"
    path.write_text(path.read_text().replace("(MIT)", "(Custom-1)"))
    without = {name: source for name, source in recipe.sources.items() if source.path != "benign_prompts.jsonl"}
    del without["refusals"]
    with pytest.raises(RecipeError, match="set recipe key licence"):
        train_head(replace(recipe, sources=without), "unclear")


def test_a_side_without_benign_rows_is_named_before_anything_is_computed(
    recipe: HeadRecipe, tiny: Pretrained, monkeypatch
):
    monkeypatch.setattr("training.run.compute_for", None)
    sources = {name: replace(source, sets_block=()) for name, source in recipe.sources.items()}
    with pytest.raises(DataError, match="cannot calibrate the request side"):
        train_head(replace(recipe, sources=sources), "plain")


def test_a_head_is_trained_on_the_tuned_model_and_brings_its_adapter(recipe: HeadRecipe, tiny: Pretrained, tmp_path):
    tuned = get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    folder = train_head(replace(recipe, adapter=str(tmp_path / "adapter")), "")
    lm = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), folder)
    assert lm.config is not None
    assert lm.config.base.weights == checkpoint.fingerprint_weights(tiny.model)
    assert checkpoint.fingerprint_weights(lm.model) != lm.config.base.weights


@pytest.fixture
def signal(saved_model: Path, data: Path, tmp_path: Path) -> Path:
    """Folder of an adapter with a `[CLS]` signal."""
    choices = {"windows": (3, 4, 5), "moves": False}
    return tune(joint(saved_model, data, tmp_path / "signal", steps=1, signal=choices), "")


def test_a_head_beside_a_cls_signal_makes_a_checkpoint_of_both(recipe: HeadRecipe, signal: Path, tmp_path: Path):
    folder = train_head(replace(recipe, adapter=str(signal), schedule="periodic-6"), "ballast-train head")
    lm = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), folder)
    assert (lm.head is None, lm.cls is None) == (False, False)
    assert lm.config.cls.windows == (3, 4, 5)
    assert not lm.config.cls.moves
    assert lm.schedule.interval(0) == 6
    card = (folder / "README.md").read_text()
    assert "A Ballast token head" in card
    assert "A `[CLS]` signal (windows [3, 4, 5], schedule periodic-6" in card
    assert "What it learned from is in `adapter/README.md`; rows below are those of the token head." in card
    # An adapter that lies in a checkpoint brings its signal too.
    assert cls_signal.beside(folder / "adapter") == folder
    again = load_subject(replace(recipe, adapter=str(folder / "adapter"))).brought.cls
    assert again is not None
    assert again.config.windows == (3, 4, 5)


@pytest.mark.draws
def test_a_cls_signal_is_calibrated_without_a_head(
    recipe: HeadRecipe, signal: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    recipe_file.dump(recipe, tmp_path / "recipe.yaml")
    assert main(["calibrate", "--config", str(tmp_path / "recipe.yaml"), f"adapter={signal}"]) == 0
    lm = checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), tmp_path / "checkpoint")
    assert (lm.head is None, lm.cls is None) == (True, False)
    trace = score(lm, lm.chat.encode([Message("user", "Hello"), Message("assistant", "Hi.")], continue_final=True))
    assert trace.assessments
    assert not (tmp_path / "checkpoint" / "plots" / "loss.png").exists()
    assert "rows below set thresholds." in (tmp_path / "checkpoint" / "README.md").read_text()
    assert "Traceback" not in capfd.readouterr().err


def test_a_checkpoint_is_calibrated_anew_and_keeps_its_weights(recipe: HeadRecipe, signal: Path, tmp_path: Path):
    first = train_head(replace(recipe, adapter=str(signal)), "")
    looser = replace(recipe.acting, request_false_positives=0.5, response_false_positives=0.5)
    again = replace(recipe, checkpoint=str(first), acting=looser, output=str(tmp_path / "looser"))
    second = calibrate_checkpoint(again, "")
    before, after = checkpoint.load(first), checkpoint.load(second)
    assert after.config.request.block < before.config.request.block
    assert torch.equal(before.head.request.out.weight, after.head.request.out.weight)
    assert torch.equal(before.cls.embedding, after.cls.embedding)
    assert before.config.base == after.config.base
    checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), second)


def test_a_checkpoint_may_be_calibrated_where_it_lies(recipe: HeadRecipe, signal: Path, tmp_path: Path):
    folder = train_head(replace(recipe, adapter=str(signal), schedule="periodic-6"), "")
    config = checkpoint.load(folder).config
    worded = replace(config, refusal=replace(config.refusal, prefix="No."))
    checkpoint.save(folder, checkpoint.load(folder).head, worded, checkpoint.load(folder).cls)
    calibrate_checkpoint(
        replace(recipe, checkpoint=str(folder), output=str(tmp_path / "run" / ".." / "checkpoint")), ""
    )
    after = checkpoint.load(folder).config
    assert after.refusal.prefix == "No."
    assert after.cls.schedule == "periodic-6"
    checkpoint.attach(load(str(tmp_path / "model"), dtype=torch.float32), folder)


@pytest.mark.parametrize("command", [train_head, calibrate_checkpoint])
def test_an_adapter_and_a_checkpoint_are_not_mixed(recipe: HeadRecipe, signal: Path, command, tmp_path: Path):
    first = train_head(replace(recipe, adapter=str(signal)), "")
    with pytest.raises(RecipeError, match="checkpoint"):
        command(replace(recipe, adapter=str(signal), checkpoint=str(first)), "")


def test_the_licence_of_an_adapter_holds_for_what_is_made_of_it(recipe: HeadRecipe, signal: Path, tmp_path: Path):
    bound = ("own_answers", "alpaca", "refusals")
    free = replace(recipe, sources={n: s for n, s in recipe.sources.items() if n not in bound}, is_permissive_only=True)
    folder = train_head(replace(free, adapter=str(signal)), "")
    assert checkpoint.load(folder).config.licence == "Apache-2.0"
    numbers = json.loads((signal / "metrics.json").read_text())
    (signal / "metrics.json").write_text(json.dumps(numbers | {"licence": "CC-BY-NC-SA-4.0"}))
    folder = train_head(replace(free, adapter=str(signal)), "")
    assert checkpoint.load(folder).config.licence == "CC-BY-NC-SA-4.0"
    again = calibrate_checkpoint(replace(free, checkpoint=str(folder), output=str(tmp_path / "again")), "")
    assert checkpoint.load(again).config.licence == "CC-BY-NC-SA-4.0"
    assert licence_beside(again / "adapter") == {"CC-BY-NC-SA-4.0"}  # which has no notes of its own


def test_without_a_signal_there_is_nothing_to_calibrate(recipe: HeadRecipe, tiny: Pretrained):
    with pytest.raises(RecipeError, match="set checkpoint, or adapter"):
        calibrate_checkpoint(recipe, "")


def test_a_checkpoint_of_another_model_is_not_calibrated(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    first = train_head(recipe, "")
    tiny_lm(seed=5).save_pretrained(tmp_path / "model")
    with pytest.raises(RecipeError, match="made for another model"):
        calibrate_checkpoint(replace(recipe, checkpoint=str(first)), "")


def test_an_unknown_schedule_is_named(recipe: HeadRecipe, signal: Path):
    with pytest.raises(RecipeError, match="recipe key schedule: unknown schedule 'often'"):
        train_head(replace(recipe, adapter=str(signal), schedule="often"), "")


def test_a_head_stands_under_the_licence_of_its_model_too(recipe: HeadRecipe, tiny: Pretrained, tmp_path: Path):
    (tmp_path / "model" / "metrics.json").write_text(json.dumps({"licence": "CC-BY-NC-SA-4.0"}))
    bound = ("own_answers", "alpaca", "refusals")
    free = replace(recipe, sources={n: s for n, s in recipe.sources.items() if n not in bound}, is_permissive_only=True)
    assert checkpoint.load(train_head(free, "")).config.licence == "CC-BY-NC-SA-4.0"
