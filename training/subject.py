"""What a head is trained on and thresholds are set for: a model, its adapter, and its `[CLS]` signal."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model import adapter, checkpoint, cls_signal
from model.attention import Span, Windows, window
from model.chat import ChatTemplate
from model.cls_signal import ClsSignal
from model.config import LONGEST_ALONE, BaseModel, ClsConfig
from model.pretrained import Pretrained, device_of, load, sha256_of
from model.reader import BEFORE
from model.safety_head import TokenHead
from model.schedule import Schedule, due, parse
from training import recipe_file
from training.config import HeadRecipe
from training.errors import RecipeError
from training.tune_config import TuneRecipe


@dataclass(frozen=True)
class ClsReading:
    """A `[CLS]` signal, and how it will be read."""

    signal: ClsSignal
    config: ClsConfig
    schedule: Schedule
    fingerprint: str
    """SHA-256 of the signal's weights."""

    def spans(self, length: int) -> list[Span]:
        """Return the assessments of a request and of a clear response of `length` tokens, its end included."""
        numbers = due(self.schedule, range(1, length + 1), 0, must_assess=True)
        windows = Windows(*self.config.windows)
        return [BEFORE, *(Span(number, window(number, windows, is_malicious=False)) for number in numbers)]


@dataclass(frozen=True)
class Subject:
    """A model as it will be served, and what is known of its signal."""

    pretrained: Pretrained
    """With the adapter in its weights."""
    base: BaseModel
    adapter: Path | None
    cls: ClsReading | None
    head: TokenHead | None = None
    """Of the checkpoint that is calibrated anew."""


def load_subject(recipe: HeadRecipe, *, has_head: bool) -> Subject:
    """Return the model that the recipe names, with what lies in `adapter` or in `checkpoint`.

    Args:
        recipe: all choices.
        has_head: a token head will be trained; otherwise that of the checkpoint is taken, if it has one.

    Raises:
        TrainingError: if the recipe beside a `[CLS]` signal cannot be read, or the checkpoint is another model's.
        ModelError: if model, adapter, signal or checkpoint cannot be loaded.
    """
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype), device=device_of(recipe.device))
    folder = Path(recipe.adapter) if recipe.adapter is not None else None
    head, signal, config, place = None, None, None, None
    if recipe.checkpoint is not None:
        place = checkpoint.find(recipe.checkpoint)
        head, signal, found = checkpoint.load(place)
        if found.base.weights != checkpoint.fingerprint_weights(pretrained.model):
            raise RecipeError(f"checkpoint {place} was made for another model than {pretrained.name}")
        config = found.cls
        folder = place / adapter.FOLDER if found.base.adapter else None
    elif folder is not None and (folder / cls_signal.FILE).is_file():
        place, signal = folder, cls_signal.load(folder)
        trained = recipe_file.load(TuneRecipe, str(folder / "recipe.yaml")).signal
        config = ClsConfig(trained.windows, trained.moves, trained.is_read) if trained is not None else None
    reading = None
    if place is not None and signal is not None and config is not None:
        schedule = schedule_of(recipe, has_head=has_head or head is not None)
        config = replace(config, schedule=recipe.schedule)
        reading = ClsReading(signal, config, schedule, sha256_of(place / cls_signal.FILE))
    base = BaseModel(
        name=pretrained.name,
        weights=checkpoint.fingerprint_weights(pretrained.model),
        chat_template=ChatTemplate(pretrained.tokenizer).fingerprint,
        dtype=recipe.dtype,
        adapter=adapter.fingerprint(folder) if folder is not None else "",
    )
    if folder is not None:
        pretrained = adapter.merge(pretrained, folder)
    if reading is not None:
        cls_signal.check(reading.signal, pretrained.model)
        reading.signal.to(pretrained.model.device)
    return Subject(pretrained, base, folder, reading, head)


def schedule_of(recipe: HeadRecipe, *, has_head: bool) -> Schedule:
    """Return when `[CLS]` will be assessed beside a token head, or without one.

    Raises:
        RecipeError: if there is no such schedule.
    """
    try:
        return parse(recipe.schedule, longest=None if has_head else LONGEST_ALONE)
    except ValueError as error:
        raise RecipeError(f"recipe key schedule: {error}") from error
