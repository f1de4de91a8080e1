"""The adapter that training fits: a new one, or one to go on with."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from model import adapter
from model.pretrained import Pretrained
from training.errors import RecipeError
from training.tune_config import Lora


def settings_of(lora: Lora) -> LoraConfig:
    """Return peft's settings: every linear layer but the output head."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def fresh(pretrained: Pretrained, lora: Lora, seed: int) -> PeftModel:
    """Return the model with a new adapter, which changes nothing yet."""
    with torch.random.fork_rng():
        set_seed(seed)  # peft draws its first weights from the global generator
        found = get_peft_model(pretrained.model, settings_of(lora))
    assert isinstance(found, PeftModel)
    return found


def going_on(pretrained: Pretrained, folder: Path, lora: Lora) -> PeftModel:
    """Return the model with the adapter of `folder`, to train on.

    Raises:
        CheckpointError: if it cannot be read, or does not fit the model.
        RecipeError: if its shape is not the recipe's.
    """
    found = adapter.attach(pretrained, folder, is_trainable=True)
    settings = found.peft_config["default"]
    there = (getattr(settings, "r", None), getattr(settings, "lora_alpha", None))
    if there != (lora.rank, lora.alpha):
        raise RecipeError(f"lora has rank and alpha {(lora.rank, lora.alpha)}, the adapter {folder} has {there}")
    return found
