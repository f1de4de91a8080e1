"""The weights that a command measures: a model, perhaps with an adapter."""

import argparse
from pathlib import Path

import torch

from model import adapter
from model.pretrained import DEFAULT_MODEL, Pretrained, device_of, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `load_tuned` reads, and how many responses are made at a time."""
    parser.add_argument("--model", default=DEFAULT_MODEL, help="short name, folder or Hub id (%(default)s)")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter to add")
    parser.add_argument("--batch-size", type=int, default=32, help="responses at a time (%(default)s)")


def load_tuned(args: argparse.Namespace) -> Pretrained:
    """Return the weights of a command line, in bfloat16.

    Raises:
        ModelError: if model or adapter cannot be loaded, or do not fit one another.
    """
    pretrained = load(args.model, dtype=torch.bfloat16, device=device_of("auto"))
    return pretrained if args.adapter is None else adapter.merge(pretrained, args.adapter)
