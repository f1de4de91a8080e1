"""The weights that a command measures: a model, perhaps with an adapter."""

import argparse
from pathlib import Path

import torch

from model.adapter import merge
from model.pretrained import DEFAULT_MODEL, Pretrained, device_of, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `load_tuned` takes, and how many responses are made at a time."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="short name, folder or Hub id (%(default)s)")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter to add")
    parser.add_argument("--batch-size", type=int, default=32, help="responses at a time (%(default)s)")


def load_tuned(model: str, adapter: Path | None = None) -> Pretrained:
    """Return a model's weights, with those of an adapter in them, in bfloat16.

    Raises:
        ModelError: if model or adapter cannot be loaded, or do not fit one another.
    """
    pretrained = load(model, dtype=torch.bfloat16, device=device_of("auto"))
    return pretrained if adapter is None else merge(pretrained, adapter)
