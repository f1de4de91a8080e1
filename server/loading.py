"""From settings to a loaded model with its signal."""

import logging
import math
import os
from pathlib import Path

import torch

from model import checkpoint as checkpoints
from model.errors import CheckpointError
from model.guarded_lm import GuardedLM
from model.pretrained import device_of, load, local
from server.engine.native import multiply_int8_of
from server.settings import NO_CHECKPOINT, ConfigurationError, Settings

logger = logging.getLogger(__name__)

DEFAULT_DTYPE = torch.bfloat16
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def load_model(settings: Settings) -> GuardedLM:
    """Return the model that `settings` name, on its device, with its safety checkpoint.

    Raises:
        ModelError: if weights or checkpoint cannot be loaded, saying why.
        ConfigurationError: if nothing multiplies weights in 8 bits here.
    """
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    elif (quota := _cpu_quota()) is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(quota, torch.get_num_threads()))  # torch counts cores, whatever a container may use
    local(settings.model)  # a model that is not there is said first: no checkpoint would help it
    name = checkpoint_name(settings)
    folder = checkpoints.find(name) if name is not None else None
    dtype, device = DEFAULT_DTYPE, device_of(settings.device)
    if settings.dtype == "int8":
        _check_int8(device)
    elif settings.dtype != "auto":
        dtype = getattr(torch, settings.dtype)
    elif folder is not None:
        dtype = getattr(torch, checkpoints.load(folder).config.base.dtype)
    pretrained = load(settings.model, dtype=dtype, device=device, trust_remote_code=settings.trust_remote_code)
    if folder is None:
        return GuardedLM(pretrained.model, pretrained.tokenizer)
    if settings.dtype == "int8":
        logger.warning("the thresholds were calibrated with weights that are not rounded to int8")
    return checkpoints.attach(
        pretrained, folder, reads_cls=settings.read_cls, schedule=settings.schedule, redraws=settings.redraw
    )


def _cpu_quota() -> int | None:
    """Return how many CPUs this process may use at once, rounded up; None without a quota (cgroups, version 2)."""
    try:
        quota, period = CPU_QUOTA.read_text(encoding="utf-8").split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # "max" is no number
        return None


def _check_int8(device: str) -> None:
    others = "bfloat16, float16, float32 or auto"
    if torch.device(device).type != "cpu":
        raise ConfigurationError(f"dtype: int8 is for device 'cpu', got {device!r}; elsewhere choose {others}")
    if multiply_int8_of() is None:
        raise ConfigurationError(
            f"dtype: int8 needs a processor with AVX2 and FMA, and a C compiler; without them choose {others}"
        )


def checkpoint_name(settings: Settings) -> str | None:
    """Return the checkpoint to load; None serves without a signal.

    Raises:
        CheckpointError: if none is named and none ships for this model.
    """
    if settings.checkpoint == NO_CHECKPOINT:
        return None
    name = settings.checkpoint or checkpoints.default_for(settings.model)
    if name is None:
        raise CheckpointError(
            f"no safety checkpoint ships for {settings.model!r}; name one with --checkpoint, or serve without a "
            "signal: --checkpoint none --input-mode off --output-mode off"
        )
    return name
