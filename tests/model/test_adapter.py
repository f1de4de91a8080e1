"""A checkpoint that brings an adapter: the model that is served is the tuned one, or none at all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from model import adapter
from model.checkpoint import CONFIG_FILE, attach, load, save
from model.errors import BaseMismatch, CheckpointError
from model.pretrained import Pretrained
from model.testing import byte_tokenizer, tiny_lm, write_tiny

IDS = torch.tensor([[5, 6, 7, 8]])


def tiny() -> Pretrained:
    return Pretrained("tiny", tiny_lm(), byte_tokenizer())


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """A checkpoint folder with an adapter that changes what the model says."""
    _, folder = write_tiny(tmp_path)
    model = get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(folder / adapter.FOLDER))
    head, _, config = load(folder)
    found = adapter.fingerprint(folder / adapter.FOLDER)
    save(folder, head, replace(config, base=replace(config.base, adapter=found)))
    return folder


@torch.inference_mode()
def test_the_served_model_is_the_tuned_one(tuned: Path):
    plain = tiny().model(IDS).logits
    lm = attach(tiny(), tuned)
    assert not torch.allclose(lm.model(IDS).logits, plain, atol=1e-3)
    assert type(lm.model).__name__ == "LlamaForCausalLM"  # merged: no layer of the adapter is left in the way


def test_a_checkpoint_whose_adapter_is_missing_is_refused(tuned: Path):
    for file in (tuned / adapter.FOLDER).iterdir():
        file.unlink()
    (tuned / adapter.FOLDER).rmdir()
    with pytest.raises(BaseMismatch, match="adapter/ beside it is missing"):
        attach(tiny(), tuned)


def test_another_adapter_than_the_signal_was_trained_with_is_refused(tuned: Path):
    raw = json.loads((tuned / CONFIG_FILE).read_text())
    raw["base"]["adapter"] = "0" * 64
    (tuned / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(BaseMismatch, match="trained with the adapter 000000000000"):
        attach(tiny(), tuned)


def test_an_adapter_that_the_signal_never_saw_is_refused(tuned: Path):
    raw = json.loads((tuned / CONFIG_FILE).read_text())
    del raw["base"]["adapter"]
    (tuned / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(BaseMismatch, match="trained with the adapter none"):
        attach(tiny(), tuned)


def test_an_adapter_of_another_model_does_not_fit(tuned: Path):
    other = Pretrained("other", tiny_lm("gpt_neox"), byte_tokenizer())
    with pytest.raises(CheckpointError, match="does not fit other"):
        adapter.merge(other, tuned / adapter.FOLDER)


@pytest.mark.parametrize("name", [adapter.WEIGHTS, adapter.SETTINGS])
def test_a_broken_file_is_an_error(tuned: Path, name: str):
    (tuned / adapter.FOLDER / name).write_bytes(b"{")
    with pytest.raises(CheckpointError):
        adapter.merge(tiny(), tuned / adapter.FOLDER)


def test_only_what_serves_is_copied(tuned: Path, tmp_path: Path):
    adapter.copy(tuned / adapter.FOLDER, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [adapter.SETTINGS, adapter.WEIGHTS]
    with pytest.raises(CheckpointError, match="cannot copy"):
        adapter.copy(tmp_path / "nothing", tmp_path / "copy")
