"""A fine-tuned model as a small adapter over the weights that it came from (LoRA, through peft)."""

import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError

from model.errors import CheckpointError
from model.pretrained import Pretrained, sha256_of

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
    from peft import PeftModel  # here, because it takes seconds to import and most checkpoints need none

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft only warns of weights that it does not find
            tuned = PeftModel.from_pretrained(pretrained.model, str(folder))
        model = tuned.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, UserWarning, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the adapter {folder} does not fit {pretrained.name}: {reason}") from error
    return Pretrained(pretrained.name, model.eval(), pretrained.tokenizer)
