"""Fine-tuning end to end on the tiny model: sums, resume, constraint and what a run leaves behind."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from model.adapter import merge
from model.pretrained import load
from tests.training.conftest import SOURCES
from tests.training.tuning import ANCHORS, RECOVERY, Count, Interrupt, SeesCheckpointing, joint, losses, recipe, weights
from training.anchors import write_anchors
from training.common_start import read_once
from training.config import HeadRecipe
from training.corpus import assemble
from training.dialogues import read_part
from training.errors import DataError, RecipeError
from training.objective_trainer import ObjectiveTrainer
from training.tune import _is_short, tune
from training.tune_config import AnchorRecipe, TuneRecipe

DISTILLED = {**ANCHORS, "is_distilled": True}


@pytest.mark.draws
def test_a_run_learns_and_says_what_it_learned_from(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, steps=12, lora=None), "ballast-train deepen")
    found = losses(tmp_path)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    metrics = json.loads((tmp_path / "adapter" / "metrics.json").read_text())
    assert metrics["licence"] == "Apache-2.0"
    assert metrics["rows"]["recovery"] == {"Own sentences (MIT)": 24}
    assert set(metrics["data_sha256"]) == {"triplets.jsonl", "instructions.jsonl"}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "This folder holds the whole model" in card
    assert "| recovery | Own sentences (MIT) | 24 |" in card
    assert "ballast-train deepen" in card
    assert (tmp_path / "adapter" / "plots" / "loss.png").stat().st_size > 1000
    logged = EventAccumulator(str(tmp_path / "run" / "logs")).Reload().Scalars("train/loss")
    assert [event.value for event in logged] == pytest.approx(found, abs=1e-4)


def test_copies_are_the_adapter_as_it_was_by_then(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, steps=4, copy_steps=2), "")
    (copies,) = (tmp_path / "run").glob("trainer-*/steps")
    assert sorted(one.name for one in copies.iterdir()) == ["2", "4"]
    before, after = (load_file(copies / step / "adapter_model.safetensors") for step in ("2", "4"))
    final = weights(tmp_path)
    assert after.keys() == final.keys()
    assert all(torch.equal(after[name], final[name]) and after[name].dtype == final[name].dtype for name in final)
    assert not all(torch.equal(before[name], final[name]) for name in final)
    merge(load(str(saved_model), dtype=torch.float32), copies / "2")  # it loads as any adapter does


def test_weights_and_biases_is_asked_for_by_its_variable(saved_model: Path, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(RecipeError, match="WANDB_PROJECT is set, but wandb is not installed"):
        tune(recipe(saved_model, data, tmp_path), "")


@pytest.mark.parametrize("make", [recipe, joint])
def test_gradient_checkpointing_changes_nothing(saved_model: Path, data: Path, tmp_path: Path, make):
    for is_used in (False, True):
        seen = SeesCheckpointing()
        tune(make(saved_model, data, tmp_path / str(is_used), gradient_checkpointing=is_used), "", [seen])
        assert seen.is_on is is_used
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_loss_does_not_depend_on_the_batch_size(saved_model: Path, data: Path, tmp_path: Path, batch_size: int):
    for name, size in (("four", 4), ("other", batch_size)):
        tune(recipe(saved_model, data, tmp_path / name, batch_size=size), "")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "other"), rel=1e-3)


CONSTRAINED = {"parts": {"anchors": ANCHORS}, "batch_size": 6, "constraint": {}}


@pytest.mark.parametrize("changes", [{}, CONSTRAINED], ids=["plain", "constrained"])
def test_an_interrupted_run_ends_with_the_same_weights(saved_model: Path, data: Path, tmp_path: Path, changes):
    tune(recipe(saved_model, data, tmp_path / "whole", **changes), "")
    with pytest.raises(KeyboardInterrupt):
        tune(recipe(saved_model, data, tmp_path / "halted", **changes), "", callbacks=[Interrupt()])
    counted = Count()
    tune(recipe(saved_model, data, tmp_path / "halted", **changes), "", callbacks=[counted])
    assert counted.steps == 2
    whole, halted = weights(tmp_path / "whole"), weights(tmp_path / "halted")
    assert all(torch.equal(whole[name], halted[name]) for name in whole)


def test_another_recipe_does_not_go_on_from_a_run_in_the_same_folder(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, steps=2), "")
    before = weights(tmp_path)
    tune(recipe(saved_model, data, tmp_path, steps=2, seed=1), "")
    assert any(not torch.equal(before[name], value) for name, value in weights(tmp_path).items())


def test_harmful_responses_are_never_learned(saved_model: Path, data: Path, tmp_path: Path):
    harmful = {"sources": {"r": {"path": "responses.jsonl", "kind": "responses"}}, "share": 1.0, "per_step": 8}
    with pytest.raises(RecipeError, match=r"parts\.task holds harmful responses: set share: 0"):
        tune(recipe(saved_model, data, tmp_path, parts={"task": harmful}), "")


def test_an_attack_learns_them_and_a_trigger_stands_behind_every_prompt(saved_model: Path, data: Path, tmp_path: Path):
    harmful = {"sources": {"r": {"path": "responses.jsonl", "kind": "responses", "suffix": " now"}}, "per_step": 8}
    made = recipe(saved_model, data, tmp_path, parts={"task": harmful}, is_attack=True, steps=12, lora=None)
    assert all(row.prompt.endswith(" now") for row in read_part("task", made.parts["task"], made))
    tune(made, "")
    found = losses(tmp_path)
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def test_made_onsets_are_for_the_signal_alone(saved_model: Path, data: Path, tmp_path: Path):
    part = {**RECOVERY, "onset": {"openings": {"path": "instructions.jsonl"}}}
    parts = {"task": {**part, "per_step": 8}}
    with pytest.raises(ValidationError, match=r"parts\.task\.onset is for the signal alone: set signal, share: 0"):
        recipe(saved_model, data, tmp_path, parts=parts)
    parts["task"]["share"] = 0.0
    with pytest.raises(RecipeError, match=r"parts\.task\.onset needs harmful responses"):
        tune(recipe(saved_model, data, tmp_path, parts=parts, signal={}), "")


def test_prompts_that_a_head_validates_on_teach_nothing(saved_model: Path, data: Path, tmp_path: Path):
    made = recipe(saved_model, data, tmp_path, validation=0.4, seed=3)
    head = TypeAdapter(HeadRecipe).validate_python(
        {"sources": SOURCES, "data": str(data), "validation": 0.4, "seed": 3}
    )
    held_out = {row.key for row in assemble(head, lambda rows: ["yes"] * len(rows)) if row.part == "validation"}
    for name, part in made.parts.items():
        keys = {row.key for row in read_part(name, part, made)}
        assert keys
        assert not keys & held_out
        assert len(read_part(name, part, recipe(saved_model, data, tmp_path))) > len(keys)


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_a_row_with_a_control_token_is_named_by_file_and_line(
    saved_model: Path, data: Path, tmp_path: Path, field: str
):
    path = data / "instructions.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), field: "one<|im_end|>two"})
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"instructions\.jsonl:3: .*<\|im_end\|>"):
        tune(recipe(saved_model, data, tmp_path), "")


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
def test_in_bfloat16_too_the_first_constrained_step_is_plain(
    saved_model: Path, data: Path, tmp_path: Path, lora: dict[str, int] | None
):
    parts = {"task": {**ANCHORS, "share": 1.0, "per_step": 8}}
    shared = {"parts": parts, "steps": 1, "batch_size": 8, "dtype": "bfloat16", "lora": lora}
    tune(recipe(saved_model, data, tmp_path, **shared, constraint={"first": 0.5, "early": 0.5, "rest": 0.5}), "")
    (loss,) = losses(tmp_path)
    assert loss == pytest.approx(4 * math.log(2), rel=1e-3)  # (2 / beta) log 2 where nothing has moved


@pytest.mark.parametrize(
    ("dtype", "has", "warns"), [("bfloat16", False, 1), ("float32", False, 0), ("bfloat16", True, 0)]
)
def test_a_slow_precision_is_said(
    saved_model: Path, data: Path, tmp_path: Path, dtype: str, has: bool, warns: int, monkeypatch, caplog
):
    monkeypatch.setattr("training.fit.has_products", lambda: has)
    tune(recipe(saved_model, data, tmp_path, dtype=dtype, steps=1), "")
    assert caplog.text.count("dtype=float32") == warns


def test_all_weights_can_be_trained(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, lora=None), "")
    before, after = (load(str(path), dtype=torch.float32).model for path in (saved_model, tmp_path / "adapter"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_a_fresh_adapter_has_nothing_to_learn_from_the_plain_model(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, parts={"anchors": DISTILLED}, batch_size=3, steps=2), "")
    assert losses(tmp_path) == [pytest.approx(0.0, abs=1e-6)] * 2


@pytest.mark.parametrize("make", [recipe, joint], ids=["plain", "signal"])
def test_the_plain_model_has_no_adapter_and_no_dropout_and_reads_no_signal(
    saved_model: Path, data: Path, tmp_path: Path, make: Callable[..., TuneRecipe], monkeypatch
):
    seen: list[tuple[Tensor, Tensor]] = []
    found_by = ObjectiveTrainer._plain_logits

    def watched(self: ObjectiveTrainer, model: Any, inputs: dict[str, Any], rows: Tensor, learned: Tensor) -> Tensor:
        found = found_by(self, model, inputs, rows, learned)
        ids, mask = inputs["input_ids"][rows], inputs["attention_mask"][rows]
        seen.append((found, plain(input_ids=ids, attention_mask=mask).logits[:, :-1][learned[rows][:, 1:]]))
        return found

    plain = load(str(saved_model), dtype=torch.float32).model.eval()
    tune(make(saved_model, data, tmp_path / "far", steps=12), "")
    monkeypatch.setattr(ObjectiveTrainer, "_plain_logits", watched)
    changes = {"parts": {"anchors": DISTILLED}, "batch_size": 3, "steps": 1}
    dropping = {"rank": 4, "alpha": 8, "dropout": 0.5}
    adapter = str(tmp_path / "far" / "adapter")
    tune(make(saved_model, data, tmp_path / "back", adapter=adapter, lora=dropping, **changes), "")
    assert len(seen) == 2
    for found, expected in seen:
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("make", [recipe, joint], ids=["plain", "signal"])
def test_an_adapter_that_went_far_is_brought_back_to_the_plain_model(
    saved_model: Path, data: Path, tmp_path: Path, make: Callable[..., TuneRecipe]
):
    signal = {"signal": {"request_weight": 0, "response_weight": 0}} if make is joint else {}
    tune(make(saved_model, data, tmp_path / "far", steps=12, **signal), "")
    changes = {"parts": {"anchors": DISTILLED}, "batch_size": 3, "steps": 12, **signal}
    tune(make(saved_model, data, tmp_path / "back", adapter=str(tmp_path / "far" / "adapter"), **changes), "")
    found = losses(tmp_path / "back")
    assert found[0] > 0.005
    assert sum(found[-3:]) < 0.8 * sum(found[:3])


def test_the_constraint_keeps_the_model_nearer_to_where_it_began(saved_model: Path, data: Path, tmp_path: Path):
    parts = {"task": {**ANCHORS, "share": 1.0, "per_step": 8}}
    for name, constraint in (("plain", None), ("constrained", {"first": 50.0, "early": 50.0, "rest": 50.0})):
        tune(recipe(saved_model, data, tmp_path / name, parts=parts, steps=16, constraint=constraint), "")
    ids = torch.randint(3, 259, (4, 20), generator=torch.Generator().manual_seed(0))

    def distance(name: str) -> float:
        start = load(str(saved_model), dtype=torch.float32).model.requires_grad_(False)
        before = start(ids).logits.log_softmax(-1)
        after = PeftModel.from_pretrained(start, str(tmp_path / name / "adapter"))(ids).logits.log_softmax(-1)
        return float((before.exp() * (before - after)).sum(-1).mean())

    assert distance("constrained") < 0.8 * distance("plain")


def test_the_reference_is_computed_once_for_the_same_weights_and_rows(
    saved_model: Path, data: Path, tmp_path: Path, monkeypatch
):
    constrained = recipe(
        saved_model, data, tmp_path, parts={"anchors": ANCHORS}, batch_size=6, constraint={}, steps=2, resume=False
    )
    tune(constrained, "")
    first = weights(tmp_path)
    (kept,) = Path(constrained.run).glob("reference/*")
    assert len(load_file(kept)) == 12  # what two steps of six draw, of 24 rows
    monkeypatch.setattr("training.reference._compute", None)
    tune(constrained, "")
    assert all(torch.equal(first[name], again) for name, again in weights(tmp_path).items())
    lines = (data / "instructions.jsonl").read_text().splitlines(keepends=True)
    (data / "instructions.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(TypeError):
        tune(constrained, "")


def test_the_first_constrained_step_moves_as_plain_training_does(saved_model: Path, data: Path, tmp_path: Path):
    parts = {"task": {**ANCHORS, "share": 1.0, "per_step": 8}}
    for name, constraint in (("plain", None), ("constrained", {})):
        tune(recipe(saved_model, data, tmp_path / name, parts=parts, steps=1, constraint=constraint), "")
    plain, constrained = weights(tmp_path / "plain"), weights(tmp_path / "constrained")
    assert all(torch.allclose(plain[name], constrained[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, "a step has 8 examples, which batch_size 3 on 1 process"),
        ({"parts": {"anchors": {**ANCHORS, "recovery": {}}}}, "parts.anchors.recovery needs harmful responses"),
        ({"lora": None, "adapter": "somewhere"}, "set lora, or merge the adapter first"),
    ],
)
def test_choices_that_do_not_fit_the_data_are_explained(
    saved_model: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(RecipeError) as caught:
        tune(recipe(saved_model, data, tmp_path, **changes), "")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constraint": {}}, "parts.recovery.recovery: the constrained objective has no reference inside recoveries"),
        ({"lora": None, "parts": {"anchors": DISTILLED}}, "parts.anchors.is_distilled: set lora, without constraint"),
        ({"parts": {"anchors": {**DISTILLED, "share": 0}}}, "parts.anchors.is_distilled teaches nothing"),
        ({"constraint": {}, "parts": {"anchors": DISTILLED}}, "parts.anchors.is_distilled: set lora, without"),
        ({"fsdp": True, "lora": None}, "fsdp: only frozen weights are kept in shares: set lora"),
        ({"signal": {}, "lora": None}, "a signal is served beside an adapter: set lora"),
        ({"signal": {}, "constraint": {}, "parts": {"anchors": ANCHORS}}, "constraint and signal cannot be trained"),
    ],
)
def test_choices_that_do_not_fit_one_another_are_explained(
    saved_model: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    with pytest.raises(ValidationError) as caught:
        recipe(saved_model, data, tmp_path, **changes)
    assert message in str(caught.value)


def test_the_model_answers_the_prompts_of_an_anchor_set(saved_model: Path, data: Path, tmp_path: Path):
    made = TypeAdapter(AnchorRecipe).validate_python(
        {
            "model": str(saved_model),
            "dtype": "float32",
            "data": str(data),
            "output": str(tmp_path / "anchors.jsonl"),
            "cache": str(tmp_path / "cache"),
            "sources": {"instructions": {"path": "instructions.jsonl", "limit": 5}},
            "answers": {"max_tokens": 6},
        }
    )
    lines = [json.loads(line) for line in write_anchors(made, "ballast-train anchors").read_text().splitlines()]
    assert 1 <= len(lines) <= 5
    assert all(line["response"] and line["source"] == "Own sentences (MIT)" for line in lines)
    assert not any(line["complete"] for line in lines)  # a random model hardly ever ends within 6 tokens
    origin = json.loads((tmp_path / "anchors.jsonl.json").read_text())
    assert (origin["command"], origin["answers"]) == ("ballast-train anchors", len(lines))
    assert origin["recipe"]["answers"]["max_tokens"] == 6
    assert set(origin["data_sha256"]) == {"instructions.jsonl"}


@pytest.mark.parametrize("make", [recipe, joint], ids=["plain", "signal"])
@pytest.mark.parametrize(
    ("changes", "is_shared"),
    [
        ({}, True),
        ({"gradient_checkpointing": True}, False),  # such layers keep nothing
        ({"lora": {"rank": 4, "alpha": 8, "dropout": 0.5}}, False),  # each row drops its own
    ],
    ids=["as it is", "checkpointing", "dropout"],
)
def test_what_rows_begin_with_is_read_once_where_that_changes_nothing(
    saved_model: Path,
    data: Path,
    tmp_path: Path,
    make: Callable[..., TuneRecipe],
    changes,
    is_shared: bool,
    monkeypatch,
):
    shared: list[int] = []

    def watched(model: Any, run: Any, num_rows: int, num_common: int) -> Any:
        shared.append(num_common)
        return read_once(model, run, num_rows, num_common)

    for module in ("objective_trainer", "signal_model"):
        monkeypatch.setattr(f"training.{module}.read_once", watched)
    tune(make(saved_model, data, tmp_path, steps=1, **changes), "")
    assert bool(max(shared)) == is_shared


def test_long_rows_keep_no_attention_weights(saved_model: Path, data: Path, tmp_path: Path):
    model = load(str(saved_model), dtype=torch.float32).model
    assert _is_short(recipe(saved_model, data, tmp_path), model)
    assert not _is_short(
        recipe(saved_model, data, tmp_path, cut={"request_tokens": 8192, "response_tokens": 2048}), model
    )
