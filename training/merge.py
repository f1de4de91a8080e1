"""The command `ballast-train merge`: an adapter and its base become one model."""

from pathlib import Path

import torch

from model import adapter
from model.pretrained import load
from training.tune_config import MergeRecipe


def merge(recipe: MergeRecipe) -> Path:
    """Write the model with the adapter added to its weights, and its tokenizer; return the folder.

    Raises:
        ModelError: if model or adapter cannot be loaded, or do not fit.
    """
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype))
    merged = adapter.merge(pretrained, Path(recipe.adapter))
    merged.model.save_pretrained(recipe.output)
    merged.tokenizer.save_pretrained(recipe.output)
    return Path(recipe.output)
