"""Safety checkpoints: `safety_config.json` beside the token head, the `[CLS]` signal, or both; perhaps an adapter."""

import hashlib
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from model import adapter, cls_signal, tensors
from model.chat import ChatTemplate
from model.cls_signal import ClsSignal
from model.config import SafetyConfig
from model.errors import BaseMismatch, CheckpointError
from model.guarded_lm import GuardedLM
from model.pretrained import NAMED, Pretrained
from model.safety_head import TokenHead

logger = logging.getLogger(__name__)

CONFIG_FILE = "safety_config.json"
HEAD_FILE = "safety_head.safetensors"
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
"""Checkpoints that come with this release."""


def fingerprint_weights(model: PreTrainedModel) -> str:
    """Return a SHA-256 over names, shapes and 16 evenly spaced values of every parameter.

    Values are rounded to bfloat16 first, so the fingerprint is the same in every precision. It is there against
    mistakes: a fine-tuned or merged model almost surely has another one, a forger can keep it.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 16)][:16].to("cpu", torch.bfloat16).float()
        digest.update(json.dumps([name, list(parameter.shape), picked.tolist()]).encode())
    return digest.hexdigest()


def find(name: str) -> Path:
    """Return the folder of a checkpoint: a path, or a name below the shipped `checkpoints/`.

    Raises:
        CheckpointError: if there is none, listing the shipped ones.
    """
    for folder in (Path(name).expanduser(), SHIPPED / name):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise CheckpointError(f"no {CONFIG_FILE} in {name!r}; shipped checkpoints are {shipped()}")


def shipped() -> list[str]:
    """Return the names of the checkpoints that come with this release."""
    return sorted(str(found.parent.relative_to(SHIPPED)) for found in SHIPPED.glob(f"**/{CONFIG_FILE}"))


def default_for(model_name: str) -> str | None:
    """Return the name of the shipped checkpoint that belongs to a named model, or None."""
    return NAMED[model_name].checkpoint if model_name in NAMED else None


class Checkpoint(NamedTuple):
    """The content of a checkpoint folder, but for the adapter."""

    head: TokenHead | None
    cls: ClsSignal | None
    config: SafetyConfig


def save(folder: Path, head: TokenHead | None, config: SafetyConfig, cls: ClsSignal | None = None) -> None:
    """Write a checkpoint, in place of one that lies there.

    All is written beside it first, so a write that fails leaves the one before. Then the configuration goes first and
    comes last: it never vouches for weights of another checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".new-") as name:
        new = Path(name)
        if head is not None:
            tensors.write(head, new / HEAD_FILE)
        if cls is not None and config.cls is not None:
            cls_signal.save(cls, new, config.cls)
        (new / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
        for file in (CONFIG_FILE, HEAD_FILE, cls_signal.FILE):
            (folder / file).unlink(missing_ok=True)
        for file in (HEAD_FILE, cls_signal.FILE, CONFIG_FILE):
            if (new / file).is_file():
                os.replace(new / file, folder / file)


def load(folder: Path) -> Checkpoint:
    """Return what a checkpoint folder holds.

    Raises:
        CheckpointError: if a file is missing, truncated, or does not have the shapes configured.
    """
    head: TokenHead | None = None
    try:
        config = SafetyConfig.from_json((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.token_head is not None:
            head = TokenHead(config.token_head)
            head.load_state_dict(load_file(folder / HEAD_FILE))
    except (OSError, SafetensorError, RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}") from error
    return Checkpoint(head, cls_signal.load(folder)[0] if config.cls is not None else None, config)


def attach(
    pretrained: Pretrained,
    folder: Path,
    *,
    reads_cls: bool | None = None,
    schedule: str | None = None,
    redraws: bool = True,
) -> GuardedLM:
    """Return the model with the signal of the checkpoint `folder`, and with its adapter if it brings one.

    Args:
        pretrained: the model.
        folder: of the checkpoint.
        reads_cls: as `GuardedLM` takes it.
        schedule: as `GuardedLM` takes it.
        redraws: draw a refusal of the model's own again where the checkpoint says so; off lets every one stand.

    Raises:
        BaseMismatch: if the checkpoint was trained on other weights or another chat template.
        CheckpointError: if the checkpoint cannot be read.
    """
    head, cls, config = load(folder)
    found = fingerprint_weights(pretrained.model)
    if found != config.base.weights:
        raise BaseMismatch(
            f"checkpoint {folder} was trained on {config.base.name} ({config.base.weights[:12]}), "
            f"but {pretrained.name} is {found[:12]}; train a head for it with ballast-train head"
        )
    if (dtype := str(pretrained.model.dtype).removeprefix("torch.")) != config.base.dtype:
        logger.warning("the thresholds were calibrated in %s, the model runs in %s", config.base.dtype, dtype)
    template = ChatTemplate(pretrained.tokenizer).fingerprint
    if template != config.base.chat_template:
        raise BaseMismatch(
            f"checkpoint {folder} was calibrated with chat template {config.base.chat_template[:12]}, "
            f"but {pretrained.name} has {template[:12]}"
        )
    if (tuned := adapter.fingerprint(folder / adapter.FOLDER)) != config.base.adapter:
        raise BaseMismatch(
            f"checkpoint {folder} was trained with the adapter {config.base.adapter[:12] or 'none'}, "
            f"but {adapter.FOLDER}/ beside it is {tuned[:12] or 'missing'}"
        )
    if tuned:
        pretrained = adapter.merge(pretrained, folder / adapter.FOLDER)
    if config.cls is not None and (reads_cls not in (None, config.cls.is_read) or schedule is not None):
        logger.warning("the thresholds were calibrated with the checkpoint's own way of reading [CLS]")
    if not redraws:
        config = replace(config, redraw_below=0.0)
    return GuardedLM(pretrained.model, pretrained.tokenizer, head, config, cls, reads_cls=reads_cls, schedule=schedule)
