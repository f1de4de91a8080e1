"""Adapters of a fine-tuning: where they lie, how one goes on from another, and the whole model of one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

from model import adapter, cls_signal
from model.adapter import merge as merged
from model.errors import CheckpointError
from model.pretrained import Pretrained, load
from model.testing import FAMILIES, byte_tokenizer, tiny_lm
from tests.training.tuning import joint, losses, recipe, weights
from training.errors import RecipeError
from training.lora import fresh
from training.merge import merge
from training.tune import tune
from training.tune_config import Lora, MergeRecipe


def test_the_adapter_changes_the_model_when_it_is_loaded(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path), "")
    plain = load(str(saved_model), dtype=torch.float32).model
    ids = torch.tensor([[5, 6, 7]])
    before = plain(ids).logits
    after = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == load(str(saved_model), dtype=torch.float32).name


def test_a_run_on_another_adapter_at_the_same_place_begins_anew(saved_model: Path, data: Path, tmp_path: Path):
    start = str(tmp_path / "first" / "adapter")
    found = []
    for seed in (0, 1):
        tune(recipe(saved_model, data, tmp_path / "first", steps=2, seed=seed), "")
        tune(recipe(saved_model, data, tmp_path / "second", steps=2, adapter=start), "")
        found.append(weights(tmp_path / "second"))
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_on_another_signal_in_the_checkpoint_of_its_adapter_begins_anew(
    saved_model: Path, data: Path, tmp_path: Path
):
    start, found = tmp_path / "checkpoint" / "adapter", []
    tune(joint(saved_model, data, tmp_path / "first", steps=1), "")
    adapter.copy(tmp_path / "first" / "adapter", start)
    for scale in (1.0, 3.0):
        signal, config = cls_signal.load(tmp_path / "first" / "adapter")
        with torch.no_grad():
            signal.embedding.mul_(scale)
        cls_signal.save(signal, start.parent, config)
        tune(joint(saved_model, data, tmp_path / "second", steps=1, adapter=str(start)), "")
        found.append(cls_signal.load(tmp_path / "second" / "adapter")[0].embedding)
    assert not torch.allclose(*found, rtol=0.1)


def test_an_adapter_that_is_not_there_is_one_line(saved_model: Path, data: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="does not fit"):
        tune(recipe(saved_model, data, tmp_path, adapter=str(tmp_path / "nothing")), "")


def test_an_adapter_of_another_shape_is_refused(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, steps=1), "")
    lora = {"rank": 2, "alpha": 99}
    with pytest.raises(RecipeError, match=r"rank and alpha \(2, 99\), the adapter .* has \(4, 8\)"):
        tune(recipe(saved_model, data, tmp_path / "next", adapter=str(tmp_path / "adapter"), lora=lora), "")


def test_an_adapter_may_begin_above_the_lower_layers(saved_model: Path, data: Path, tmp_path: Path):
    upper = {"rank": 4, "alpha": 8, "first_layer": 2}
    tune(recipe(saved_model, data, tmp_path, lora=upper), "")
    assert {name.split(".layers.")[1].split(".")[0] for name in weights(tmp_path)} == {"2"}
    plain, tuned = (load(str(saved_model), dtype=torch.float32), load(str(saved_model), dtype=torch.float32))
    tuned = merged(tuned, tmp_path / "adapter")
    ids = torch.tensor([[1, 30, 31, 32]])
    before, after = (one.model(ids, output_hidden_states=True).hidden_states for one in (plain, tuned))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, True, False]
    tune(recipe(saved_model, data, tmp_path / "next", adapter=str(tmp_path / "adapter"), lora=upper), "")
    lora = {"rank": 4, "alpha": 8}
    with pytest.raises(RecipeError, match=r"lora\.first_layer is 0, but the adapter .* is on layers \[2\]"):
        tune(recipe(saved_model, data, tmp_path / "other", adapter=str(tmp_path / "adapter"), lora=lora), "")
    with pytest.raises(RecipeError, match=r"lora\.first_layer 3 must be below the number of layers, 3"):
        tune(recipe(saved_model, data, tmp_path / "deeper", lora=upper | {"first_layer": 3}), "")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_upper_layers_have_adapters_in_every_family(model_type: str):
    pretrained = Pretrained(model_type, tiny_lm(model_type), byte_tokenizer())
    every = {name for name, _ in fresh(pretrained, Lora(first_layer=0), 0).named_parameters() if ".2." in name}
    pretrained = Pretrained(model_type, tiny_lm(model_type), byte_tokenizer())
    upper = fresh(pretrained, Lora(first_layer=2), 0)
    assert {name for name, _ in upper.named_parameters() if "lora_" in name} == {n for n in every if "lora_" in n}


def test_a_run_goes_on_from_an_adapter(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path / "first", steps=12), "")
    tune(recipe(saved_model, data, tmp_path / "second", adapter=str(tmp_path / "first" / "adapter")), "")
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]


def test_a_merged_model_says_what_the_tuned_one_says(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path), "")
    made = {"adapter": str(tmp_path / "adapter"), "model": str(saved_model), "output": str(tmp_path / "merged")}
    folder = merge(MergeRecipe(**made, dtype="float32"), "ballast-train merge")
    assert yaml.safe_load((folder / "recipe.yaml").read_text()).items() >= made.items()
    ids = torch.tensor([[5, 6, 7]])
    tuned = PeftModel.from_pretrained(load(str(saved_model), dtype=torch.float32).model, str(tmp_path / "adapter"))
    assert torch.allclose(load(str(folder), dtype=torch.float32).model(ids).logits, tuned(ids).logits, atol=1e-4)


def test_what_is_trained_on_a_merged_model_stands_under_its_licence_too(saved_model: Path, data: Path, tmp_path: Path):
    tune(recipe(saved_model, data, tmp_path, steps=1), "")
    noted = tmp_path / "adapter" / "metrics.json"
    assert json.loads(noted.read_text())["licence"] == "Apache-2.0"
    noted.write_text(json.dumps({"licence": "CC-BY-NC-SA-4.0"}))
    made = {"adapter": str(tmp_path / "adapter"), "model": str(saved_model), "output": str(tmp_path / "merged")}
    folder = merge(MergeRecipe(**made, dtype="float32"), "ballast-train merge")
    again = tune(recipe(folder, data, tmp_path / "again", steps=1), "")
    assert json.loads((again / "metrics.json").read_text())["licence"] == "CC-BY-NC-SA-4.0"


def test_a_licence_of_its_own_stays_and_two_that_do_not_go_together_are_refused(
    saved_model: Path, data: Path, tmp_path: Path
):
    tune(recipe(saved_model, data, tmp_path, steps=1), "")
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps({"licence": "CC-BY-SA-4.0"}))
    made = {"adapter": str(tmp_path / "adapter"), "model": str(saved_model), "output": str(tmp_path / "merged")}
    folder = merge(MergeRecipe(**made, dtype="float32"), "ballast-train merge")
    assert json.loads((folder / "metrics.json").read_text())["licence"] == "CC-BY-SA-4.0"
    made["model"] = str(shutil.copytree(saved_model, tmp_path / "other"))
    (tmp_path / "other" / "metrics.json").write_text(json.dumps({"licence": "GPL-3.0"}))
    with pytest.raises(RecipeError, match=r"does not follow from \['CC-BY-SA-4.0', 'GPL-3.0'\]"):
        merge(MergeRecipe(**made, dtype="float32"), "ballast-train merge")
