"""The command `ballast-train dpo`: direct preference optimisation on triplets, the baseline through TRL.

Refusals are preferred to harmful responses, both from the first token on: what deepening is compared with.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]  # made available lazily there

from model.chat import ChatTemplate, Message
from model.pretrained import Pretrained, load
from model.widening import widen
from training import fit, lora, recipe_file
from training.dialogues import Dialogue, read_part
from training.errors import RecipeError
from training.head import newest_checkpoint
from training.licences import licence_beside, licence_for
from training.logs import loggers
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
    fit.check_processes()
    fit.warn_of_precision(recipe)
    rows = read_part("preferences", recipe.part, recipe)
    if any(row.harmful is None for row in rows):
        raise RecipeError("part.sources must be triplets: a preference needs a harmful response too")
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype), device=fit.own_device(recipe))
    licence = licence_for(recipe, {row.licence for row in rows} | licence_beside(Path(recipe.model)))
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    recipe_file.dump(recipe, run / "recipe.yaml")
    folder = run / f"trainer-{fit.identity(recipe, pretrained, None, [repr(row) for row in rows])[:12]}"
    trainer = DPOTrainer(
        model=pretrained.model,
        args=_arguments(recipe, folder),
        train_dataset=Dataset.from_list([_preference(row, pretrained) for row in rows]),
        processing_class=_ending(pretrained),
        peft_config=lora.settings_of(recipe.lora, pretrained.model),
        callbacks=[*loggers(run), *callbacks],
    )
    if recipe.dtype == "bfloat16":
        widen(trainer.model)  # type: ignore[arg-type]  # there is one by now, the adapter in it
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder, recipe.resume))
    if trainer.is_world_process_zero():
        learned = {"preferences": (recipe.part, rows)}
        tuned: Any = trainer.model
        fit.write(recipe, tuned, pretrained, learned, trainer.state.log_history, licence, command)
    return Path(recipe.output)


def _arguments(recipe: DpoRecipe, folder: Path) -> DPOConfig:
    """Return the trainer's settings.

    Raises:
        RecipeError: if a step cannot be cut into full batches.
    """
    arguments = fit.arguments(
        DPOConfig,
        recipe,
        folder,
        beta=recipe.beta,
        max_length=recipe.cut.request_tokens + recipe.cut.response_tokens,
        gradient_checkpointing=False,
    )
    at_once = recipe.batch_size * max(1, arguments.n_gpu) * arguments.world_size
    if recipe.part.per_step % at_once:
        raise RecipeError(f"part.per_step {recipe.part.per_step} is no multiple of the {at_once} preferences of a pass")
    arguments.gradient_accumulation_steps = recipe.part.per_step // at_once
    return arguments


def _ending(pretrained: Pretrained) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the token that ends a response as its last one, which TRL puts after every text."""
    tokenizer = copy.deepcopy(pretrained.tokenizer)
    if (end := ChatTemplate(tokenizer).end_of_turn(pretrained.eos_ids)) is not None:
        tokenizer.eos_token = str(tokenizer.decode([end]))
    return tokenizer


def _preference(row: Dialogue, pretrained: Pretrained) -> dict[str, str]:
    """Return one preference as text: the rendered request, and both responses without what ends them.

    The tokenizer puts its first token before the request once more if it stands there, so that one is left out.
    """
    tokenizer = pretrained.tokenizer
    request = list(ChatTemplate(tokenizer).encode([Message("user", row.prompt)]).request)
    prompt = str(tokenizer.decode(request))
    if request[:1] == tokenizer.encode("")[:1]:
        prompt = prompt.removeprefix(str(tokenizer.decode(request[:1])))
    return {"prompt": prompt, "chosen": row.response, "rejected": str(row.harmful)}
