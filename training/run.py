"""The commands `ballast-train head` and `calibrate`: rows, states, head, thresholds, checkpoint."""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from model import adapter, checkpoint
from model.chat import ChatTemplate
from model.config import VERSION, RefusalConfig, SafetyConfig
from model.pretrained import Pretrained
from model.safety_head import TokenHead
from training import recipe_file
from training.answers import answer
from training.augment import augment
from training.calibrate import Calibration, calibrate, check
from training.config import Head, HeadRecipe
from training.corpus import assemble
from training.disguise import disguised
from training.errors import RecipeError
from training.head import Trained, train
from training.licences import licence_beside, licence_for
from training.logs import loggers
from training.model_card import model_card
from training.onsets import opened
from training.plots import draw
from training.query import highest_logits, still_true
from training.rephrase import rephrased
from training.report import calibration_report, checksums, count_sources, metrics
from training.rows import Row
from training.shards import digest
from training.states import States, compute_for
from training.subject import Subject, load_subject
from training.surround import surrounded

logger = logging.getLogger(__name__)


def train_head(recipe: HeadRecipe, command: str, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train and calibrate a token head; return the folder of its checkpoint.

    Interrupted, the same recipe goes on where it was: answers, states and epochs are kept.

    Args:
        recipe: all choices.
        command: the command line, for the model card.
        callbacks: further callbacks of the trainer.

    Raises:
        TrainingError: if recipe or data do not fit.
        ModelError: if the model cannot be loaded.
    """
    if recipe.checkpoint is not None:
        raise RecipeError(
            "checkpoint is for ballast-train calibrate and query; a head is trained on the model, or on adapter"
        )
    subject = load_subject(recipe)
    recipe = _with_layers(recipe, subject)
    rows, licence, states = _prepare(recipe, subject)
    folder = Path(recipe.run) / f"trainer-{_identity(recipe, subject, rows)[:12]}"
    width = int(subject.pretrained.model.config.get_text_config().hidden_size)
    trained = train(rows, states, recipe, width, folder, (*loggers(Path(recipe.run)), *callbacks))
    calibration = _calibrate(recipe, subject, trained.head, rows, states)
    _write_checkpoint(recipe, subject, rows, trained, calibration, licence, command)
    return Path(recipe.output)


def spread(depth: int) -> tuple[int, ...]:
    """Return the layers that a head reads of so many: where `head_all_rows` reads those of 30, and the final state."""
    return (*sorted({depth * layer // 30 for layer in (8, 12, 16, 20, 24)}), -1)


def _warn(recipe: HeadRecipe, subject: Subject) -> None:
    """Say what a calibration changes that nobody may have asked for, and what may make `block` too low."""
    for name in ("smoothing", "patience", "lookback"):
        now = getattr(recipe.acting, name)
        if now != (before := getattr(subject.brought.config, name, now)):
            logger.warning("acting.%s becomes %s, the checkpoint's was %s", name, now, before)
    if subject.brought.adapter is not None:
        for name in [name for name, source in recipe.sources.items() if source.sets_block and not source.without]:
            logger.warning("sources.%s sets `block`; set its `without` to what the adapter was tuned on", name)


def _with_layers(recipe: HeadRecipe, subject: Subject) -> HeadRecipe:
    """Return the recipe with layers for the head to read, spread over the model where it names none."""
    depth = int(subject.pretrained.model.config.get_text_config().num_hidden_layers)
    return replace(recipe, head=replace(recipe.head, layers=recipe.head.layers or spread(depth)))


def calibrate_checkpoint(recipe: HeadRecipe, command: str) -> Path:
    """Set the thresholds of a checkpoint anew, or those of an adapter with a `[CLS]` signal; return the new folder.

    Raises:
        TrainingError: if recipe or data do not fit, or there is no signal to calibrate.
        ModelError: if model or checkpoint cannot be loaded.
    """
    subject = load_subject(recipe)
    if subject.brought.head is None and subject.brought.cls is None:
        raise RecipeError("set checkpoint, or adapter to a folder that ballast-train signal wrote")
    shape = subject.brought.head.config if subject.brought.head is not None else None
    # Without a token head only what `[CLS]` finds is used, but some states must be read.
    recipe = replace(recipe, head=Head(shape.layers, shape.hidden) if shape is not None else Head())
    _warn(recipe, subject)
    rows, licence, states = _prepare(recipe, subject, is_held_out_only=True)
    trained = Trained(subject.brought.head, {})
    calibration = _calibrate(recipe, subject, trained.head, rows, states)
    _write_checkpoint(recipe, subject, rows, trained, calibration, licence, command)
    return Path(recipe.output)


def _calibrate(
    recipe: HeadRecipe, subject: Subject, head: TokenHead | None, rows: Sequence[Row], states: States
) -> Calibration:
    """Return the thresholds; those of responses as the policy will read them.

    Where `[CLS]` turns out to have no share in the risk of responses, it is assessed by its schedule there
    (`model.reader`), and the states of the tokens that read it differ a little from those that said so.
    """
    queries = None
    if head is not None and head.query is not None:
        queries = highest_logits(recipe, subject.pretrained, head, rows, recipe.acting.smoothing)
    found = calibrate(head, rows, states, recipe, queries=queries)
    if head is None or subject.brought.cls is None or found.response_share > 0.0:
        return found
    held_out = [row for row in rows if row.part != "train"]
    read = compute_for(recipe, subject, held_out, recipe.head.layers, is_scheduled=True)
    return calibrate(head, held_out, read, recipe, (found.request_share, found.response_share), queries)


def _prepare(recipe: HeadRecipe, subject: Subject, *, is_held_out_only: bool = False) -> tuple[list[Row], str, States]:
    """Return the rows, or those that nothing is trained on, the licence of what is made of all, and their states."""
    rows = _rows(recipe, subject.pretrained)
    check(rows, recipe)
    before = subject.brought.licences | licence_beside(Path(recipe.model))
    licence = licence_for(recipe, {row.licence for row in rows} | before)
    _write_run(recipe, rows)
    if is_held_out_only:
        rows = [row for row in rows if row.part != "train"]
    return rows, licence, compute_for(recipe, subject, rows, recipe.head.layers)


def _rows(recipe: HeadRecipe, pretrained: Pretrained) -> list[Row]:
    """Return the labelled rows with the model's own answers, and made ones.

    Those are requests in other words, surroundings and disguises, and responses that turn.
    """
    rows = assemble(
        recipe,
        lambda prompts: answer(
            pretrained,
            prompts,
            recipe.answers,
            max_request_tokens=recipe.cut.request_tokens,
            cache=Path(recipe.cache),
            seed=recipe.seed,
        ),
    )
    settings = recipe.augment
    if settings.system > 0.0 and not ChatTemplate(pretrained.tokenizer).takes_system:
        logger.warning("the chat template takes no system message: no row gets one")
        settings = replace(settings, system=0.0)

    def count(text: str) -> int:
        return len(pretrained.tokenizer(text, add_special_tokens=False).input_ids)

    more = (augment, rephrased, surrounded, disguised, partial(opened, count=count))
    made = (make(rows, settings, recipe.seed) for make in more)
    return list(chain.from_iterable(made))


def _write_run(recipe: HeadRecipe, rows: Sequence[Row]) -> None:
    """Keep the resolved recipe and the checksums of its data beside the run, and show the counts."""
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    recipe_file.dump(recipe, run / "recipe.yaml")
    counts = count_sources(rows)
    table = Table("source", "licence", "train", "validation", "calibration", title=f"{len(rows)} rows")
    for count in counts:
        table.add_row(*(str(value) for value in asdict(count).values()))
    Console(stderr=True).print(table)
    summary = {
        "seed": recipe.seed,
        "data_sha256": checksums(recipe.sources.values(), recipe.data),
        "rows": [asdict(count) for count in counts],
    }
    (run / "data.json").write_text(_json(summary), encoding="utf-8")


def _write_checkpoint(
    recipe: HeadRecipe,
    subject: Subject,
    rows: Sequence[Row],
    trained: Trained,
    calibration: Calibration,
    licence: str,
    command: str,
) -> None:
    """Write everything beside the weights first, and the checkpoint itself last."""
    output = Path(recipe.output)
    output.mkdir(parents=True, exist_ok=True)
    brought = subject.brought
    cls = brought.cls.config if brought.cls is not None else None
    if cls is not None:
        cls = replace(cls, request_share=calibration.request_share, response_share=calibration.response_share)
    config = SafetyConfig(
        base=subject.base,
        token_head=trained.head.config if trained.head is not None else None,
        cls=cls,
        request=calibration.request.thresholds,
        response=calibration.response.thresholds,
        onset=calibration.onset,
        smoothing=recipe.acting.smoothing,
        patience=recipe.acting.patience,
        lookback=recipe.acting.lookback,
        redraw_below=calibration.redraw_below,
        refusal=brought.config.refusal if brought.config is not None else RefusalConfig(),
        licence=licence,
        calibration=calibration_report(rows, calibration, recipe) | still_true(brought.config),
    )
    card = model_card(
        config, recipe, count_sources(rows), checksums(recipe.sources.values(), recipe.data), calibration, command
    )
    numbers = _json(metrics(rows, trained, calibration, recipe, command))
    (output / "README.md").write_text(card, encoding="utf-8")
    for folder in (output, Path(recipe.run)):
        (folder / "metrics.json").write_text(numbers, encoding="utf-8")
    draw(output / "plots", trained.history, calibration)
    if brought.adapter is None or brought.adapter.resolve() != (output / adapter.FOLDER).resolve():
        shutil.rmtree(output / adapter.FOLDER, ignore_errors=True)
        if brought.adapter is not None:
            adapter.copy(brought.adapter, output / adapter.FOLDER)
    checkpoint.save(output, trained.head, config, brought.cls.signal if brought.cls is not None else None)


def _identity(recipe: HeadRecipe, subject: Subject, rows: Sequence[Row]) -> str:
    """Return a SHA-256 of all that decides the head's weights, so that no other run's state is continued."""
    optimisers = (recipe.request_optimiser, recipe.response_optimiser)
    choices = [asdict(group) for group in (recipe.head, recipe.loss, *optimisers, recipe.cut)]
    model = [VERSION, checkpoint.fingerprint_weights(subject.pretrained.model), recipe.dtype]
    if subject.brought.cls is not None:
        model.append([subject.brought.cls.fingerprint, asdict(subject.brought.cls.config)])
    return digest(model, choices, recipe.acting.smoothing, recipe.seed, [repr(row) for row in rows])


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
