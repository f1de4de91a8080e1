"""Where a run writes its losses."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback


def loggers(run: Path) -> tuple[TrainerCallback, ...]:
    """Return a TensorBoard logger below `run`, where TensorBoard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return ()
    writer = SummaryWriter(log_dir=str(run / "logs"))
    return (TensorBoardCallback(writer),)  # type: ignore[no-untyped-call]  # untyped there
