"""The preference baseline on the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import TrainerCallback

from model.chat import ChatTemplate, Message
from model.pretrained import Pretrained
from tests.training.tuning import Count, Interrupt, places
from training.dialogues import Dialogue
from training.errors import RecipeError
from training.preference import _preference, dpo
from training.tune_config import DpoRecipe

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL about itself


def recipe(data: Path, tmp_path: Path, **changes: Any) -> DpoRecipe:
    values: dict[str, Any] = {
        **places(tmp_path / "model", data, tmp_path),
        "steps": 6,
        "batch_size": 2,
        "part": {"per_step": 4, "sources": {"triplets": {"path": "triplets.jsonl", "kind": "triplets"}}},
        "lora": {"rank": 4, "alpha": 8},
        "optimiser": {"learning_rate": 1e-2},
    }
    return TypeAdapter(DpoRecipe).validate_python({**values, **changes})


def test_refusals_come_to_be_preferred(tiny: Pretrained, data: Path, tmp_path: Path):
    folder = dpo(recipe(data, tmp_path), "ballast-train dpo")
    log = [entry for entry in json.loads((folder / "metrics.json").read_text())["log"] if "loss" in entry]
    assert len(log) == 6
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the reference itself prefers neither
    assert log[-1]["loss"] < 0.68
    assert any("lora_A" in name for name in load_file(folder / "adapter_model.safetensors"))


def test_an_interrupted_run_ends_with_the_same_weights(tiny: Pretrained, data: Path, tmp_path: Path):
    whole, halted = (
        recipe(data, tmp_path, steps=4, output=str(tmp_path / name / "adapter"), run=str(tmp_path / name))
        for name in ("whole", "halted")
    )
    found = [load_file(dpo(whole, "") / "adapter_model.safetensors")]
    with pytest.raises(KeyboardInterrupt):
        dpo(halted, "", (Interrupt(),))
    counted = Count()
    found.append(load_file(dpo(halted, "", (counted,)) / "adapter_model.safetensors"))
    assert counted.steps == 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_another_recipe_does_not_go_on_from_a_run_in_the_same_folder(tiny: Pretrained, data: Path, tmp_path: Path):
    found = []
    for beta in (0.1, 5.0):
        folder = dpo(recipe(data, tmp_path, steps=2, beta=beta), "")
        found.append(load_file(folder / "adapter_model.safetensors"))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_request_has_its_first_token_once(tiny: Pretrained):
    tokenizer = tiny.tokenizer
    row = Dialogue("own", "MIT", "STEAL it", "No.", "Sure")
    plain = _preference(row, tiny)
    assert plain["prompt"].startswith("<|im_start|>")
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)]
    )
    request = list(ChatTemplate(tokenizer).encode([Message("user", row.prompt)]).request)
    assert tokenizer.encode(_preference(row, tiny)["prompt"]) == request


def test_both_responses_end_with_the_token_that_ends_a_turn_alone(tiny: Pretrained, data: Path, tmp_path: Path):
    tiny.tokenizer.eos_token = "<|endoftext|>"  # as Gemma has another one beside that of its turns
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in tiny.eos_ids
    seen = []

    class Sees(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.extend(kwargs["train_dataloader"].dataset)

    dpo(recipe(data, tmp_path, steps=1), "", (Sees(),))
    ids = [row[name] for row in seen for name in ("chosen_ids", "rejected_ids")]
    assert all(one[-1] == end and one.count(end) == 1 and tiny.tokenizer.eos_token_id not in one for one in ids)


def test_pairs_are_no_preferences(tiny: Pretrained, data: Path, tmp_path: Path):
    pairs = {"sources": {"i": {"path": "instructions.jsonl"}}}
    with pytest.raises(RecipeError, match="must be triplets"):
        dpo(recipe(data, tmp_path, part=pairs), "")


def test_a_step_is_whole_batches(tiny: Pretrained, data: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="per_step 4 is no multiple of the 3 preferences"):
        dpo(recipe(data, tmp_path, batch_size=3), "")


def test_weights_spread_over_processes_are_refused(tiny: Pretrained, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP by way of accelerate is not supported: start with torchrun"):
        dpo(recipe(data, tmp_path), "")
