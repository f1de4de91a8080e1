"""What the fine-tuning commands share: the trainer's settings, what names a run, and what it leaves behind."""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments

from model import adapter, cls_signal
from model.checkpoint import fingerprint_weights
from model.pretrained import Pretrained, device_of, sha256_of
from model.widening import has_products
from training import recipe_file
from training.dialogues import Dialogue
from training.errors import RecipeError
from training.model_card import fit_card
from training.plots import draw_steps
from training.report import checksums
from training.shards import digest
from training.tune_config import DialogueSource, FitRecipe, Part

logger = logging.getLogger(__name__)

UNTRAINED = ("output", "run", "resume", "name", "licence", "save_steps", "copy_steps", "gradient_checkpointing", "fsdp")
"""Keys of a recipe that do not change the weights."""

WORKERS = 2
"""Processes that make the batches of a GPU ready; on a CPU they would take its cores from the steps."""

A = TypeVar("A", bound=TrainingArguments)


def check_processes() -> None:
    """Refuse processes that accelerate would give a share of all weights each.

    Raises:
        RecipeError: if they were started so.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise RecipeError(
            "FSDP by way of accelerate is not supported: start with torchrun; sft, deepen, signal and constrain keep "
            "frozen weights in shares with fsdp=true"
        )


def warn_of_precision(recipe: FitRecipe) -> None:
    """Say where the processor has no products in the precision of the recipe, and another is faster."""
    if recipe.dtype == "bfloat16" and device_of(recipe.device) == "cpu" and not has_products():
        logger.warning("this processor has no products in bfloat16: with dtype=float32 a step takes half of the time")


def own_device(recipe: FitRecipe) -> str:
    """Return the torch device that this process loads the model to: of several on a machine each has its own GPU."""
    found, number = device_of(recipe.device), os.environ.get("LOCAL_RANK")
    return f"cuda:{int(number) % torch.cuda.device_count()}" if found == "cuda" and number is not None else found


def arguments(kind: type[A], recipe: FitRecipe, folder: Path, **more: Any) -> A:
    """Return the trainer's settings of one kind; `more` are those that are particular to the command."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.batch_size,
        "learning_rate": recipe.optimiser.learning_rate,
        "adam_beta1": recipe.optimiser.betas[0],
        "adam_beta2": recipe.optimiser.betas[1],
        "weight_decay": recipe.optimiser.weight_decay,
        "warmup_steps": recipe.optimiser.warmup_steps,
        "max_grad_norm": recipe.optimiser.max_grad_norm,
        "lr_scheduler_type": "linear",
        "bf16": recipe.dtype == "bfloat16",
        "use_cpu": device_of(recipe.device) == "cpu",
        "save_steps": recipe.save_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "dataloader_num_workers": 0 if device_of(recipe.device) == "cpu" else WORKERS,
        "report_to": [],
        "seed": recipe.seed,
    }
    return kind(**settings, **more)


def identity(recipe: FitRecipe, pretrained: Pretrained, start: str | None, rows: Any) -> str:
    """Return a SHA-256 of all that decides the weights, so that no other run's state is continued.

    Args:
        recipe: all choices.
        pretrained: the model that is trained.
        start: folder of the adapter that is trained on, or None.
        rows: what is learned, as JSON values.
    """
    choices = {name: value for name, value in asdict(recipe).items() if name not in UNTRAINED}
    before = ""
    if start is not None:
        signal = cls_signal.beside(Path(start))
        before = adapter.fingerprint(Path(start)) + (sha256_of(signal / cls_signal.FILE) if signal is not None else "")
    return digest(fingerprint_weights(pretrained.model), before, choices, rows)


def write(
    recipe: FitRecipe,
    model: PreTrainedModel | PeftModel,
    pretrained: Pretrained,
    parts: Mapping[str, tuple[Part, Sequence[Dialogue]]],
    history: Sequence[dict[str, float]],
    licence: str,
    command: str,
) -> None:
    """Save the weights in the precision that serves, and what they came from."""
    output = Path(recipe.output)
    if isinstance(model, PeftModel):
        model.peft_config["default"].base_model_name_or_path = pretrained.name  # not the path of this machine
    model.to(getattr(torch, recipe.dtype)).save_pretrained(str(output))
    if not isinstance(model, PeftModel):
        pretrained.tokenizer.save_pretrained(str(output))
    recipe_file.dump(recipe, output / "recipe.yaml")
    counts = {name: dict(Counter(f"{row.source} ({row.licence})" for row in rows)) for name, (_, rows) in parts.items()}
    kind = "adapter (LoRA, for peft)" if isinstance(model, PeftModel) else "whole model"
    card = fit_card(recipe.name, pretrained.name, kind, licence, counts, command)
    (output / "README.md").write_text(card, encoding="utf-8")
    draw_steps(output / "plots", history)
    summary = {
        "command": command,
        "licence": licence,
        "rows": counts,
        "data_sha256": checksums((source for part, _ in parts.values() for source in _origins(part)), recipe.data),
        "log": list(history),
    }
    (output / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def _origins(part: Part) -> list[DialogueSource]:
    """Return where the rows of a part come from, and the openings of its made onsets."""
    return [*part.sources.values(), *([part.onset.openings] if part.onset is not None else [])]
