"""A fine-tuned model as a small adapter over the weights that it came from (LoRA, through peft)."""

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from model.errors import CheckpointError
from model.pretrained import Pretrained, sha256_of

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "adapter"
"""Where a checkpoint keeps its adapter."""
WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the adapter's weights; empty where `folder` holds none.

    Raises:
        CheckpointError: if the weights cannot be read.
    """
    if not folder.is_dir():
        return ""
    try:
        return sha256_of(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"cannot read the adapter {folder}: {error}") from error


def copy(source: Path, target: Path) -> None:
    """Copy an adapter: its weights and its settings, and nothing else.

    Raises:
        CheckpointError: if a file is missing.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        for name in (WEIGHTS, SETTINGS):
            shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise CheckpointError(f"cannot copy the adapter {source}: {error}") from error


def merge(pretrained: Pretrained, folder: Path) -> Pretrained:
    """Return the model with the adapter added to its weights, which are changed in place.

    Raises:
        CheckpointError: if the adapter cannot be read, or does not fit the model.
    """
    model = attach(pretrained, folder).merge_and_unload()
    return Pretrained(pretrained.name, model.eval(), pretrained.tokenizer)


def attach(pretrained: Pretrained, folder: Path, *, is_trainable: bool = False) -> "PeftModel":
    """Return the model with the adapter beside its weights, which stay as they are.

    Args:
        pretrained: the model that the adapter was trained on.
        folder: of the adapter.
        is_trainable: training goes on with the adapter's weights.

    Raises:
        CheckpointError: if the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftModel  # here, because it takes seconds to import and most checkpoints need none

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft only warns of weights that it does not find
            return PeftModel.from_pretrained(pretrained.model, str(folder), is_trainable=is_trainable)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the adapter {folder} does not fit {pretrained.name}: {reason}") from error
