"""Under which licence weights stand: what follows from the rows, and from the weights that training began with."""

import json
from pathlib import Path

from model import adapter
from model.checkpoint import CONFIG_FILE
from training.config import HeadRecipe
from training.errors import RecipeError
from training.rows import licence_of_weights
from training.tune_config import FitRecipe


def licence_for(recipe: HeadRecipe | FitRecipe, licences: set[str]) -> str:
    """Return the licence of weights made of rows under `licences`: the recipe's, or what follows from the rows.

    Raises:
        RecipeError: if the recipe names none and none follows.
    """
    licence = recipe.licence or licence_of_weights(licences)
    if licence is None:
        raise RecipeError(f"set recipe key licence: it does not follow from {sorted(licences)}")
    return licence


def licence_beside(folder: Path) -> set[str]:
    """Return the licences noted beside weights, by a fine-tuning or a merge, or by the checkpoint that they lie in.

    Of a stranger's nothing is known.
    """
    notes = [folder / "metrics.json"]
    if folder.name == adapter.FOLDER:
        notes.append(folder.parent / CONFIG_FILE)
    return {licence for path in notes if (licence := _noted(path)) is not None}


def _noted(path: Path) -> str | None:
    try:
        noted = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError:  # some other program's
        return None
    found = noted.get("licence") if isinstance(noted, dict) else None
    return str(found) if found is not None else None
