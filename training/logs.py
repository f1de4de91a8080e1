"""Where a run writes its losses."""

import os
from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from training.errors import RecipeError


def loggers(run: Path) -> tuple[TrainerCallback, ...]:
    """Return a TensorBoard logger below `run`, where that is installed, and Weights & Biases where it is asked for.

    It is asked for by the variable `WANDB_PROJECT`.

    Raises:
        RecipeError: if it is asked for and not installed.
    """
    found: list[TrainerCallback] = []
    if os.environ.get("WANDB_PROJECT"):
        try:
            found.append(WandbCallback())  # type: ignore[no-untyped-call]  # untyped there
        except RuntimeError as error:
            raise RecipeError("WANDB_PROJECT is set, but wandb is not installed: pip install wandb") from error
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return tuple(found)
    writer = SummaryWriter(log_dir=str(run / "logs"))
    return (*found, TensorBoardCallback(writer))  # type: ignore[no-untyped-call]  # untyped there
