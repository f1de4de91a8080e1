"""The commands `sft`, `deepen`, `signal` and `constrain`: fine-tune a language model with the recipe's objective.

The loop is that of transformers' `Trainer`, the loss that of `objective_trainer.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from model import cls_signal
from model.chat import ChatTemplate
from model.cls_signal import ClsSignal, sliding_windows
from model.config import ClsConfig
from model.pretrained import Pretrained, device_of, load
from model.widening import widen
from training import fit, fsdp, lora, recipe_file
from training.common_start import can_share
from training.dialogues import Dialogue, read_openings, read_part
from training.errors import RecipeError
from training.head import newest_checkpoint
from training.licences import licence_beside, licence_for
from training.logs import loggers
from training.objective_trainer import ObjectiveTrainer
from training.reference import Reference, reference_logprobs
from training.signal_model import SignalModel, collate_signal, fresh_signal
from training.steps import EncodedPart, Example, Steps, collate, encode
from training.tune_config import Signal, TuneRecipe

LARGEST_ATTENTION = 4 * 2**30
"""Bytes of the attention weights that a pass may keep for its gradients."""


class Copies(TrainerCallback):
    """Writes an adapter every so many steps, in the precision that serves, to a folder named by the step.

    Args:
        model: with the adapter.
        every: steps between two copies.
        folder: holds the folders of the copies.
        dtype: the precision.
    """

    def __init__(self, model: PeftModel, every: int, folder: Path, dtype: torch.dtype) -> None:
        self._model = model
        self._every = every
        self._folder = folder
        self._dtype = dtype

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write a copy where it is time for one."""
        if state.global_step % self._every == 0 and state.is_world_process_zero:
            trained = ((name, one) for name, one in self._model.named_parameters() if one.requires_grad)
            found = {name: one.detach().to(self._dtype) for name, one in trained}
            self._model.save_pretrained(str(self._folder / str(state.global_step)), state_dict=found)


def tune(recipe: TuneRecipe, command: str, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Fine-tune a model; return the folder of the adapter, or of the whole model.

    Interrupted, the same recipe goes on where it was and ends with the same weights.

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
    place = "cpu" if recipe.fsdp else fit.own_device(recipe)  # shares go to their GPUs when they are made
    pretrained = load(recipe.model, dtype=_storage(recipe), device=place)
    if _is_short(recipe, pretrained.model):
        pretrained.model.set_attn_implementation("eager")  # its gradient is faster on a CPU, and needs more memory
    dialogues = {name: read_part(name, part, recipe) for name, part in recipe.parts.items()}
    openings = {
        name: read_openings(name, part.onset, recipe) for name, part in recipe.parts.items() if part.onset is not None
    }
    licences = {row.licence for rows in (*dialogues.values(), *openings.values()) for row in rows}
    before = [Path(name) for name in (recipe.model, recipe.adapter) if name is not None]
    licence = licence_for(recipe, licences.union(*map(licence_beside, before)))
    parts = _encoded(recipe, dialogues, openings, pretrained)
    identity = fit.identity(
        recipe, pretrained, recipe.adapter, [[part.name, part.rows, part.openings] for part in parts]
    )
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    recipe_file.dump(recipe, run / "recipe.yaml")

    model = _trainable(pretrained, recipe)
    if recipe.dtype == "bfloat16":
        widen(model)  # the adapter too
    steps = Steps(parts, recipe.steps, recipe.seed, recipe.signal)
    folder = run / f"trainer-{identity[:12]}"
    arguments = _arguments(recipe, steps.per_step, folder)
    if isinstance(model, PeftModel) and recipe.fsdp:
        fsdp.share_frozen(model, arguments.device)
    watching = [*loggers(run), *callbacks]
    if isinstance(model, PeftModel) and recipe.copy_steps is not None:
        watching.append(Copies(model, recipe.copy_steps, folder / "steps", getattr(torch, recipe.dtype)))
    reference = None
    if recipe.constraint is not None:
        with torch.autocast(device_of(recipe.device), torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            reference = reference_logprobs(
                model,
                steps.rows(),
                pad_id=pretrained.pad_id,
                batch_size=recipe.batch_size,
                cache=run,
                identity=identity,
            )
    once = _reads_common_once(recipe, pretrained.model, arguments)
    whole: nn.Module = model
    windows: dict[str, int | None] = {}
    if recipe.signal is not None:
        whole = SignalModel(model, _signal(recipe, recipe.signal, pretrained.model), once)
        windows = sliding_windows(pretrained.model)
    trainer = ObjectiveTrainer(
        model=whole,
        args=arguments,
        data_collator=partial(
            _batch, pad_id=pretrained.pad_id, reference=reference, signal=recipe.signal, windows=windows
        ),
        train_dataset=steps,
        callbacks=watching,
        constraint=recipe.constraint,
        signal=recipe.signal,
        distils=any(part.is_distilled for part in recipe.parts.values()),
        reads_common_once=once,
        per_step=steps.per_step,
        is_shared=recipe.fsdp,
        optimizers=(_optimiser(whole, recipe), None),
    )
    with disable_input_dtype_casting(model):  # to float32 and, under autocast, back: a tenth of a step, for nothing
        trainer.train(resume_from_checkpoint=newest_checkpoint(folder, recipe.resume))
    if trainer.is_world_process_zero():
        _write_signal(recipe, whole)
        learned = {name: (part, dialogues[name]) for name, part in recipe.parts.items()}
        fit.write(recipe, model, pretrained, learned, trainer.state.log_history, licence, command)
    return Path(recipe.output)


def _batch(
    examples: Sequence[Example],
    *,
    pad_id: int,
    reference: Reference | None,
    signal: Signal | None,
    windows: Mapping[str, int | None],
) -> dict[str, Tensor]:
    """Return a padded batch, with what the constraint and the signal need of it, where there are any."""
    batch = collate(examples, pad_id)
    if reference is not None:
        found = torch.zeros(batch["labels"].shape)
        for place, example in enumerate(examples):
            found[place, example.num_given : len(example.ids)] = reference[example.row]
        batch["reference"] = found
    if signal is not None:
        batch |= collate_signal(examples, signal, windows)._asdict()
    return batch


def _encoded(
    recipe: TuneRecipe,
    dialogues: Mapping[str, Sequence[Dialogue]],
    openings: Mapping[str, Sequence[Dialogue]],
    pretrained: Pretrained,
) -> list[EncodedPart]:
    """Return the parts as token ids.

    Raises:
        RecipeError: if a part holds rows that it cannot learn from.
    """
    parts, tokenizer = [], pretrained.tokenizer
    end = ChatTemplate(tokenizer).end_of_turn(pretrained.eos_ids)
    for name, part in recipe.parts.items():
        if not recipe.is_attack and part.share > 0 and any(row.response_label == 1 for row in dialogues[name]):
            raise RecipeError(f"parts.{name} holds harmful responses: set share: 0, so that only the signal learns")
        if part.recovery is not None and any(row.harmful is None for row in dialogues[name]):
            raise RecipeError(
                f"parts.{name}.recovery needs harmful responses to begin with: triplets, or responses read as "
                "own_refusal; set recovery: null for others"
            )
        rows = encode(dialogues[name], tokenizer, recipe.cut, part.response_tokens, end=end)
        encoded = EncodedPart(name, rows, part.share, part.per_step, part.recovery, is_distilled=part.is_distilled)
        if part.onset is not None:
            if any(row.response_label != 1 for row in dialogues[name]):
                raise RecipeError(f"parts.{name}.onset needs harmful responses: set response: harmful_response")
            found = [row.response for row in encode(openings[name], tokenizer, recipe.cut, end=end)]
            encoded = replace(encoded, openings=found, longest_opening=part.onset.longest)
        parts.append(encoded)
    return parts


def _signal(recipe: TuneRecipe, settings: Signal, model: PreTrainedModel) -> ClsSignal:
    """Return the signal of the adapter that training goes on from, or a fresh one.

    Raises:
        CheckpointError: if it does not fit the model.
        RecipeError: if it has another head than the recipe asks for.
    """
    place = cls_signal.beside(Path(recipe.adapter)) if recipe.adapter is not None else None
    if place is None:
        found = fresh_signal(model, settings, recipe.seed)
    else:
        found, _ = cls_signal.load(place)
        cls_signal.check(found, model)
        if (width := found.hidden.out_features if found.hidden is not None else 0) != settings.hidden:
            raise RecipeError(f"signal.hidden is {settings.hidden}, the signal beside the adapter has {width}")
    found.embedding.requires_grad_(settings.is_embedding_trained)
    return found.to(model.device)


def _write_signal(recipe: TuneRecipe, whole: nn.Module) -> None:
    """Write the signal that was trained, or the one beside the adapter that training went on from."""
    output = Path(recipe.output)
    if isinstance(whole, SignalModel) and recipe.signal is not None:
        choices = recipe.signal
        cls_signal.save(whole.signal, output, ClsConfig(choices.windows, choices.moves, choices.is_read))
    elif recipe.adapter is not None and (place := cls_signal.beside(Path(recipe.adapter))) is not None:
        found, config = cls_signal.load(place)
        cls_signal.save(found, output, config)


def _trainable(pretrained: Pretrained, recipe: TuneRecipe) -> PreTrainedModel | PeftModel:
    """Return the model with what shall be trained: an adapter, or all of it.

    Raises:
        RecipeError: if an adapter is to go on, but all weights are to be trained, or its shape is another.
        CheckpointError: if the adapter cannot be read.
    """
    if recipe.lora is None:
        if recipe.adapter is not None:
            raise RecipeError("adapter goes on with an adapter's weights; set lora, or merge the adapter first")
        return pretrained.model
    if recipe.adapter is not None:
        return lora.going_on(pretrained, Path(recipe.adapter), recipe.lora)
    return lora.fresh(pretrained, recipe.lora, recipe.seed)


def _optimiser(model: nn.Module, recipe: TuneRecipe) -> torch.optim.AdamW:
    """Return AdamW over what is trained; the signal, which begins from nothing, has a learning rate of its own."""
    settings = recipe.optimiser
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_signal = [parameter for name, parameter in trained if name.startswith("signal.")]
    others = [parameter for name, parameter in trained if not name.startswith("signal.")]
    groups: list[dict[str, Any]] = [{"params": others}]
    if recipe.signal is not None:
        groups.append({"params": of_signal, "lr": recipe.signal.learning_rate})
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


def _arguments(recipe: TuneRecipe, per_step: int, folder: Path) -> TrainingArguments:
    """Return the trainer's settings.

    Raises:
        RecipeError: if a step cannot be cut into full batches.
    """
    renamed = "activation_checkpointing"  # in transformers 5.2x; the old name warns there
    checkpointing = renamed if renamed in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"
    arguments = fit.arguments(
        TrainingArguments,
        recipe,
        folder,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        **{checkpointing: recipe.gradient_checkpointing},
    )
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"{arguments.n_gpu} GPUs are visible to one process; start with torchrun, or hide all but one"
        )
    if recipe.fsdp and arguments.world_size == 1:
        raise RecipeError("fsdp shares weights among several processes: start with torchrun")
    at_once = recipe.batch_size * arguments.world_size
    if per_step % at_once:
        raise RecipeError(
            f"a step has {per_step} examples, which batch_size {recipe.batch_size} on {arguments.world_size} "
            "process(es) does not divide"
        )
    arguments.gradient_accumulation_steps = per_step // at_once
    return arguments


def _is_short(recipe: TuneRecipe, model: PreTrainedModel) -> bool:
    """Tell whether on a CPU the attention weights of a pass, in float32 and bfloat16, take up little memory."""
    config = model.config.get_text_config()
    heads = config.num_hidden_layers * config.num_attention_heads
    longest = recipe.cut.request_tokens + recipe.cut.response_tokens
    return device_of(recipe.device) == "cpu" and recipe.batch_size * heads * longest**2 * 6 <= LARGEST_ATTENTION


def _reads_common_once(recipe: TuneRecipe, model: PreTrainedModel, arguments: TrainingArguments) -> bool:
    """Tell whether a pass may read once what its rows begin with, without another result.

    Processes that share the model must run it equally often, checkpointed layers keep nothing, and dropout must differ
    from row to row.
    """
    drops = recipe.lora is None or recipe.lora.dropout > 0
    return arguments.world_size == 1 and not recipe.gradient_checkpointing and not drops and can_share(model)


def _storage(recipe: TuneRecipe) -> torch.dtype:
    """Return the precision of the frozen weights; trained ones are kept in float32."""
    return getattr(torch, recipe.dtype) if recipe.lora is not None else torch.float32
