"""The recipe of a fine-tuned language model: every choice of a run, frozen. `recipe_file.py` reads it from YAML.

One recipe serves every objective. Plain fine-tuning is one part; deepening is a part of recovery examples beside
one of anchors; `constraint` makes either the constrained objective.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from training.config import STRICT, Answers, AtLeastOne, Count, Cut, NonNegative, Positive, Share

DialogueKind = Literal["triplets", "pairs"]
"""Fields of a row. `triplets`: prompt, harmful_response, refusal. `pairs`: prompt, response."""


@dataclass(frozen=True, config=STRICT)
class DialogueSource:
    """Rows of one origin."""

    path: str
    """A .jsonl file, relative to the recipe's `data` or to the working folder; or a Hub id."""
    kind: DialogueKind = "pairs"
    match: str = ""
    """Keep only rows whose `source` begins with this."""
    limit: Count | None = None
    """Rows to sample; null takes all."""
    credit: str = ""
    """`Name (LICENCE)` for rows without a `source` field."""
    split: str = "train"
    """Split of a Hub data set."""


@dataclass(frozen=True, config=STRICT)
class Recovery:
    """How deep into a harmful answer a refusal begins; arXiv 2406.05946, section 3."""

    probability: Share = 0.5
    """p: share of the draws with a harmful prefix at all. 0 is the shallow control."""
    deepest: AtLeastOne = 100
    """C: the longest prefix, in tokens."""


@dataclass(frozen=True, config=STRICT)
class Part:
    """Rows that share one weight in the loss."""

    sources: Annotated[dict[str, DialogueSource], Field(min_length=1)]
    share: Positive = 1.0
    """Weight of the part's mean over its response tokens: alpha, or 1 - alpha."""
    per_step: AtLeastOne = 16
    """Examples in one optimiser step."""
    recovery: Recovery | None = None
    """Begin each refusal after a harmful prefix of random length; needs triplets. Null never does."""


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Low-rank adapters on every linear layer but the output head."""

    rank: AtLeastOne = 16
    alpha: AtLeastOne = 32
    """The adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


@dataclass(frozen=True, config=STRICT)
class Adam:
    """AdamW, with a linear fall of the learning rate after the warm-up."""

    learning_rate: Positive = 2e-5
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    warmup_steps: Count = 0
    max_grad_norm: Positive = 1.0


@dataclass(frozen=True, config=STRICT)
class Constraint:
    """beta_t of the constrained objective; arXiv 2406.05946, section 4."""

    first: Positive = 0.5
    early: Positive = 2.0
    rest: Positive = 0.1
    last_early: AtLeastOne = 5
    """The last position with `early`."""


@dataclass(frozen=True, config=STRICT)
class TuneRecipe:
    """Everything that decides what `ballast-train sft`, `deepen` and `constrain` write."""

    parts: Annotated[dict[str, Part], Field(min_length=1)]
    name: str = "tuned"
    model: str = "smollm2-135m"
    adapter: str | None = None
    """Folder of an adapter to go on from; null begins with the model as it is."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the arithmetic; what is trained is kept in float32."""
    device: str = "auto"
    """A torch device; `auto` takes the GPU where there is one."""
    data: str = "data/train"
    """Folder of the sources' files."""
    output: str = "runs/tuned/adapter"
    """Folder of the finished adapter, or of the whole model where `lora` is null."""
    run: str = "runs/tuned"
    """Folder of this run: resolved recipe, checksums, training state, logs."""
    resume: bool = True
    """Go on from the last training checkpoint of the same recipe in `run`."""
    seed: int = 0
    is_permissive_only: bool = False
    """Use only rows under MIT, Apache or CC-BY."""
    licence: str | None = None
    """Licence of the weights; null derives it from the rows."""
    steps: AtLeastOne = 160
    """Optimiser steps."""
    batch_size: AtLeastOne = 8
    """Examples of one forward pass and process; a step is cut into as many passes as it takes."""
    save_steps: AtLeastOne = 10
    """Steps between two training checkpoints."""
    gradient_checkpointing: bool = False
    cut: Cut = Cut(request_tokens=256, response_tokens=256)
    lora: Lora | None = Lora()
    """Null trains all weights."""
    optimiser: Adam = Adam()
    constraint: Constraint | None = None
    """Hold every token near the model that training starts from; null does not."""


@dataclass(frozen=True, config=STRICT)
class AnchorRecipe:
    """Everything that decides what `ballast-train anchors` writes."""

    sources: Annotated[dict[str, DialogueSource], Field(min_length=1)]
    """Only the prompts are read."""
    name: str = "anchors"
    model: str = "smollm2-135m"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"
    """A torch device; `auto` takes the GPU where there is one."""
    data: str = "data/train"
    """Folder of the sources' files."""
    output: str = "runs/anchors.jsonl"
    """The file of answers, which a `pairs` source reads."""
    cache: str = "runs/cache"
    """Folder of finished batches."""
    seed: int = 0
    is_permissive_only: bool = False
    """Use only rows under MIT, Apache or CC-BY."""
    request_tokens: AtLeastOne = 256
    """Longer requests lose their beginning."""
    answers: Answers = Answers()


@dataclass(frozen=True, config=STRICT)
class MergeRecipe:
    """Everything that decides what `ballast-train merge` writes."""

    adapter: str
    """Folder of the adapter."""
    name: str = "merged"
    model: str = "smollm2-135m"
    """The model that the adapter was trained on."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    output: str = "runs/merged"
    """Folder of the whole model, which any program that reads Hugging Face models loads."""
