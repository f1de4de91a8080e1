"""The recipe of `ballast-train harden`: one recipe for each of its steps."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from training.config import STRICT, HeadRecipe, Recipe
from training.tune_config import AnchorRecipe, TuneRecipe


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HardenRecipe(Recipe):
    """Everything that decides what `ballast-train harden` writes.

    What is said here of model, device, data, seed and licences holds for every step, and where a step writes follows
    from `run` and `output`. What `signal` and `head` read of the outputs of `anchors` is what those steps wrote.
    """

    name: str = "hardened"
    output: str = "runs/hardened/checkpoint"
    """Folder of the checkpoint."""
    run: str = "runs/hardened"
    """Folder of everything else."""
    anchors: Annotated[dict[str, AnchorRecipe], Field(min_length=1)]
    """The model's own answers, and beginnings of more of them, each set by a name."""
    signal: TuneRecipe
    """Deepened refusals and the `[CLS]` signal, in one run."""
    head: HeadRecipe
    """The token head, all thresholds, and the head that reads every token of the query."""

    def __post_init__(self) -> None:
        outputs = [anchors.output for anchors in self.anchors.values()]
        if len({*outputs}) < len(outputs):
            raise ValueError(f"anchors: each set needs an output of its own, got {sorted(outputs)}")
