"""The recipe of `ballast-train harden`: one recipe for each of its steps."""

from pydantic.dataclasses import dataclass

from training.config import STRICT, HeadRecipe, Recipe
from training.tune_config import AnchorRecipe, TuneRecipe


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HardenRecipe(Recipe):
    """Everything that decides what `ballast-train harden` writes.

    What is said here of model, device, data, seed and licences holds for every step, and where a step writes follows
    from `run` and `output`. What `signal` and `head` read of the outputs of `anchors` and `short_anchors` is what those
    steps wrote.
    """

    name: str = "hardened"
    output: str = "runs/hardened/checkpoint"
    """Folder of the checkpoint."""
    run: str = "runs/hardened"
    """Folder of everything else."""
    anchors: AnchorRecipe
    """The model's own answers."""
    short_anchors: AnchorRecipe | None = None
    """The beginnings of more of them; null makes none."""
    signal: TuneRecipe
    """Deepened refusals and the `[CLS]` signal, in one run."""
    head: HeadRecipe
    """The token head, and all thresholds."""
