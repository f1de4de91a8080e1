"""The adapter that training fits: a new one, or one to go on with."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from model import adapter
from model.pretrained import Pretrained
from training.errors import RecipeError
from training.tune_config import Lora


def settings_of(lora: Lora, model: PreTrainedModel) -> LoraConfig:
    """Return peft's settings: every linear layer but the output head, from `first_layer` on.

    Raises:
        RecipeError: if the model has no layer from there on.
    """
    depth = model.config.get_text_config().num_hidden_layers
    if lora.first_layer >= depth:
        raise RecipeError(f"lora.first_layer {lora.first_layer} must be below the number of layers, {depth}")
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_linear_names(model) if lora.first_layer else "all-linear",
        layers_to_transform=list(range(lora.first_layer, depth)) if lora.first_layer else None,
        task_type="CAUSAL_LM",
    )


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Return what linear layers are called; peft chooses decoder layers only among names, not for "all-linear"."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # untyped there
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    return sorted({name.rpartition(".")[2] for name in linear})


def fresh(pretrained: Pretrained, lora: Lora, seed: int) -> PeftModel:
    """Return the model with a new adapter, which changes nothing yet.

    Raises:
        RecipeError: as `settings_of`.
    """
    with torch.random.fork_rng():
        set_seed(seed)  # peft draws its first weights from the global generator
        found = get_peft_model(pretrained.model, settings_of(lora, pretrained.model))
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
    layers = getattr(settings, "layers_to_transform", None)
    if layers != settings_of(lora, pretrained.model).layers_to_transform:
        raise RecipeError(
            f"lora.first_layer is {lora.first_layer}, but the adapter {folder} is on layers {layers or 'all'}"
        )
    return found
