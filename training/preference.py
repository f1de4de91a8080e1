"""The command `ballast-train dpo`: direct preference optimisation on triplets, the baseline through TRL.

Refusals are preferred to harmful responses, both from the first token on: what deepening is compared with.
"""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # made available lazily there

from model.chat import ChatTemplate, Message
from model.checkpoint import fingerprint_weights
from model.pretrained import Pretrained, device_of, load
from training import recipe_file
from training.dialogues import Dialogue, read_part
from training.errors import RecipeError
from training.head import newest_checkpoint
from training.logs import loggers
from training.lora import settings_of
from training.report import checksums
from training.shards import digest
from training.tune import UNTRAINED
from training.tune_config import DpoRecipe


def dpo(recipe: DpoRecipe, command: str, callbacks: tuple[TrainerCallback, ...] = ()) -> Path:
    """Train an adapter on preferences; return its folder.

    The reference is the model without the adapter. Interrupted, the same recipe goes on where it was.

    Args:
        recipe: all choices.
        command: the command line, kept with the numbers.
        callbacks: further callbacks of the trainer.

    Raises:
        TrainingError: if recipe or data do not fit.
        ModelError: if the model cannot be loaded.
    """
    rows = read_part("preferences", recipe.part, recipe)
    if any(row.harmful is None for row in rows):
        raise RecipeError("part.sources must be triplets: a preference needs a harmful response too")
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype), device=device_of(recipe.device))
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    recipe_file.dump(recipe, run / "recipe.yaml")
    choices = {name: value for name, value in asdict(recipe).items() if name not in UNTRAINED}
    identity = digest(fingerprint_weights(pretrained.model), choices, [repr(row) for row in rows])
    folder = run / f"trainer-{identity[:12]}"
    trainer = DPOTrainer(
        model=pretrained.model,
        args=_arguments(recipe, folder),
        train_dataset=Dataset.from_list([_preference(row, pretrained) for row in rows]),
        processing_class=pretrained.tokenizer,
        peft_config=settings_of(recipe.lora),
        callbacks=[*loggers(run), *callbacks],
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder, recipe.resume))
    output = Path(recipe.output)
    if trainer.is_world_process_zero():
        tuned: Any = trainer.model
        tuned.to(getattr(torch, recipe.dtype)).save_pretrained(str(output))
        recipe_file.dump(recipe, output / "recipe.yaml")
        numbers = {
            "command": command,
            "rows": dict(Counter(f"{row.source} ({row.licence})" for row in rows)),
            "data_sha256": checksums(recipe.part.sources.values(), recipe.data),
            "log": trainer.state.log_history,
        }
        (output / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return output


def _arguments(recipe: DpoRecipe, folder: Path) -> DPOConfig:
    """Return the trainer's settings.

    Raises:
        RecipeError: if a step cannot be cut into full batches.
    """
    arguments = DPOConfig(
        output_dir=str(folder),
        beta=recipe.beta,
        max_length=recipe.cut.request_tokens + recipe.cut.response_tokens,
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.optimiser.learning_rate,
        adam_beta1=recipe.optimiser.betas[0],
        adam_beta2=recipe.optimiser.betas[1],
        weight_decay=recipe.optimiser.weight_decay,
        warmup_steps=recipe.optimiser.warmup_steps,
        max_grad_norm=recipe.optimiser.max_grad_norm,
        lr_scheduler_type="linear",
        bf16=recipe.dtype == "bfloat16",
        use_cpu=device_of(recipe.device) == "cpu",
        gradient_checkpointing=False,
        logging_steps=1,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=False,
        report_to=[],
        seed=recipe.seed,
    )
    at_once = recipe.batch_size * max(1, arguments.n_gpu) * arguments.world_size
    if recipe.part.per_step % at_once:
        raise RecipeError(f"part.per_step {recipe.part.per_step} is no multiple of the {at_once} preferences of a pass")
    arguments.gradient_accumulation_steps = recipe.part.per_step // at_once
    return arguments


def _preference(row: Dialogue, pretrained: Pretrained) -> dict[str, str]:
    """Return one preference as text: the rendered request, and both responses with their end."""
    tokenizer = pretrained.tokenizer
    prompt = tokenizer.decode(list(ChatTemplate(tokenizer).encode([Message("user", row.prompt)]).request))
    end = str(tokenizer.eos_token)
    return {"prompt": str(prompt), "chosen": row.response + end, "rejected": f"{row.harmful}{end}"}
