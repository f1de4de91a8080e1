"""The command `ballast-train merge`: an adapter and its base become one model."""

import json
from pathlib import Path

import torch

from model import adapter
from model.pretrained import load
from training import recipe_file
from training.errors import RecipeError
from training.licences import licence_beside
from training.rows import licence_of_weights
from training.tune_config import MergeRecipe


def merge(recipe: MergeRecipe, command: str) -> Path:
    """Write the model with the adapter added to its weights, its tokenizer, and what they came from; return the folder.

    The licence is that of adapter and model, as far as they say it: what is trained on the whole model stands under it.

    Args:
        recipe: all choices.
        command: the command line, kept beside the weights.

    Raises:
        ModelError: if model or adapter cannot be loaded, or do not fit.
        RecipeError: if no licence follows from theirs.
    """
    licence = _licence(licence_beside(Path(recipe.adapter)) | licence_beside(Path(recipe.model)))
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype))
    merged = adapter.merge(pretrained, Path(recipe.adapter))
    output = Path(recipe.output)
    merged.model.save_pretrained(output)
    merged.tokenizer.save_pretrained(output)
    origin = {"model": recipe.model, "adapter": adapter.fingerprint(Path(recipe.adapter))}
    noted = {"command": command, "licence": licence, "merged": origin}
    (output / "metrics.json").write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
    recipe_file.dump(recipe, output / "recipe.yaml")
    return output


def _licence(licences: set[str]) -> str | None:
    """Return the licence of what is merged; None where neither says any.

    Raises:
        RecipeError: if none follows from both.
    """
    found = next(iter(licences)) if len(licences) == 1 else licence_of_weights(licences)
    if licences and found is None:
        raise RecipeError(f"the licence of the whole model does not follow from {sorted(licences)}")
    return found
