"""What a head is trained on and thresholds are set for: a model, its adapter, and its `[CLS]` signal."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from model import adapter, checkpoint, cls_signal
from model.attention import Span, Windows, window
from model.chat import ChatTemplate
from model.cls_signal import ClsSignal
from model.config import BaseModel, ClsConfig, SafetyConfig
from model.pretrained import Pretrained, device_of, load, sha256_of
from model.reader import BEFORE
from model.safety_head import TokenHead
from model.schedule import parse, positions
from training.config import HeadRecipe
from training.errors import RecipeError
from training.licences import licence_beside


@dataclass(frozen=True)
class ClsReading:
    """A `[CLS]` signal, and how it will be read."""

    signal: ClsSignal
    config: ClsConfig
    fingerprint: str
    """SHA-256 of the signal's weights."""

    def spans(self, length: int, *, is_given: bool) -> list[Span]:
        """Return the assessments of a request and of a response of `length` tokens, by rule R2.

        Args:
            length: tokens of the response.
            is_given: assess each token, as is done with a response that a client sends where `[CLS]` has a share in
                its risk; otherwise those of the schedule, as while a harmless one is generated.
        """
        windows = Windows(*self.config.windows)
        numbers = range(1, length + 1) if is_given else positions(parse(self.config.schedule), length)
        return [BEFORE, *(Span(n, window(n, windows, is_malicious=False)) for n in numbers)]


class Brought(NamedTuple):
    """What an adapter's folder, or a checkpoint, adds to the model."""

    adapter: Path | None = None
    cls: ClsReading | None = None
    head: TokenHead | None = None
    """Only of a checkpoint."""
    config: SafetyConfig | None = None
    """Only of a checkpoint."""
    licences: frozenset[str] = frozenset()
    """Of these weights."""


@dataclass(frozen=True)
class Subject:
    """A model as it will be served, and what is known of its signal."""

    pretrained: Pretrained
    """With the adapter in its weights."""
    base: BaseModel
    brought: Brought


def load_subject(recipe: HeadRecipe) -> Subject:
    """Return the model that the recipe names, with what lies in `adapter` or in `checkpoint`.

    Raises:
        TrainingError: if the checkpoint is another model's, or both an adapter and a checkpoint are named.
        ModelError: if model, adapter, signal or checkpoint cannot be loaded.
    """
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype), device=device_of(recipe.device))
    brought = Brought()
    if recipe.checkpoint is not None:
        brought = _of_checkpoint(recipe, checkpoint.find(recipe.checkpoint), pretrained)
    elif recipe.adapter is not None:
        brought = _of_adapter(recipe, Path(recipe.adapter))
    base = BaseModel(
        name=pretrained.name,
        weights=checkpoint.fingerprint_weights(pretrained.model),
        chat_template=ChatTemplate(pretrained.tokenizer).fingerprint,
        dtype=recipe.dtype,
        adapter=adapter.fingerprint(brought.adapter) if brought.adapter is not None else "",
    )
    if brought.adapter is not None:
        pretrained = adapter.merge(pretrained, brought.adapter)
    if brought.cls is not None:
        cls_signal.check(brought.cls.signal, pretrained.model)
        brought.cls.signal.to(pretrained.model.device)
    return Subject(pretrained, base, brought)


def _of_checkpoint(recipe: HeadRecipe, folder: Path, pretrained: Pretrained) -> Brought:
    if recipe.adapter is not None:
        raise RecipeError("adapter and checkpoint are both set: a checkpoint brings its own adapter")
    head, signal, config = checkpoint.load(folder)
    if config.base.weights != checkpoint.fingerprint_weights(pretrained.model):
        raise RecipeError(f"checkpoint {folder} was made for another model than {pretrained.name}")
    return Brought(
        adapter=folder / adapter.FOLDER if config.base.adapter else None,
        cls=_reading(recipe, folder, signal, config.cls),
        head=head,
        config=config,
        licences=frozenset({config.licence}),
    )


def _of_adapter(recipe: HeadRecipe, folder: Path) -> Brought:
    place = cls_signal.beside(folder)
    reading = _reading(recipe, place, *cls_signal.load(place)) if place is not None else None
    return Brought(folder, reading, licences=frozenset(licence_beside(folder)))


def _reading(recipe: HeadRecipe, folder: Path, signal: ClsSignal | None, config: ClsConfig | None) -> ClsReading | None:
    if signal is None or config is None:
        return None
    return ClsReading(signal, _scheduled(config, recipe), sha256_of(folder / cls_signal.FILE))


def _scheduled(config: ClsConfig, recipe: HeadRecipe) -> ClsConfig:
    """Return the configuration with the recipe's schedule, if it names one.

    Raises:
        RecipeError: if there is no such schedule.
    """
    if recipe.schedule is None:
        return config
    try:
        parse(recipe.schedule)
    except ValueError as error:
        raise RecipeError(f"recipe key schedule: {error}") from error
    return replace(config, schedule=recipe.schedule)
