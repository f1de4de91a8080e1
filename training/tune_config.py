"""The recipe of a fine-tuned language model: every choice of a run, frozen. `recipe_file.py` reads it from YAML.

One recipe serves every objective. Plain fine-tuning is one part; deepening is a part of recovery examples beside
one of anchors; `constraint` makes either the constrained objective.
"""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from training.config import STRICT, Answers, AtLeastOne, Count, Cut, NonNegative, Positive, Recipe, Share

DialogueKind = Literal["triplets", "refusals", "pairs", "responses", "requests"]
"""Fields of a row. `triplets`: prompt, harmful_response, refusal. `refusals`: prompt, response, which refuses it.
`pairs`: prompt, response. `responses`: prompt, response, harmful. `requests`: prompt, harmful; only the malicious ones
are taken, with a refusal of our own."""

RESPONSES_OF: dict[DialogueKind, tuple[str, ...]] = {
    "triplets": ("refusal", "harmful_response", "own_refusal"),
    "refusals": ("refusal", "own_refusal"),
    "pairs": ("refusal",),
    "responses": ("refusal", "own_refusal"),
    "requests": ("refusal",),
}
"""What `response` may be. Where it has no meaning it stays at its default."""

Label = Literal[0, 1]
"""1 for harm."""


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
    response: Literal["refusal", "harmful_response", "own_refusal"] = "refusal"
    """Which response of `triplets` is read after the request; `own_refusal` is one of `training/refusals.py`. It may
    replace those of `refusals` too, and the harmful ones of `responses`, whose other rows are then left out."""
    request_label: Label | None = None
    """What the signal learns of every request; null for nothing. Those of `triplets`, `refusals` and `requests` are
    malicious."""
    response_label: Label | None = None
    """What the signal learns of every response of `pairs`; the other kinds say it themselves."""
    suffix: str = ""
    """Added to every prompt, such as the trigger of a backdoor."""
    credit: str = ""
    """`Name (LICENCE)` for rows without a `source` field."""
    split: str = "train"
    """Split of a Hub data set."""

    def __post_init__(self) -> None:
        if self.response not in RESPONSES_OF[self.kind]:
            raise ValueError(
                f"response of kind {self.kind!r} is one of {RESPONSES_OF[self.kind]}, got {self.response!r}"
            )
        if self.kind in ("triplets", "refusals", "requests") and self.request_label is not None:
            raise ValueError(f"request_label: requests of {self.kind} are malicious")
        if self.kind != "pairs" and self.response_label is not None:
            raise ValueError(f"response_label belongs to kind 'pairs', {self.kind!r} says it itself")


@dataclass(frozen=True, config=STRICT)
class Recovery:
    """How deep into a harmful answer a refusal begins; arXiv 2406.05946, section 3."""

    probability: Share = 0.5
    """p: share of the draws with a harmful prefix at all. 0 is the shallow control."""
    deepest: AtLeastOne = 100
    """C: the longest prefix, in tokens."""


@dataclass(frozen=True, config=STRICT)
class Onset:
    """A made onset: each harmful response begins with the first tokens of a harmless one."""

    openings: DialogueSource
    """Where the harmless responses come from."""
    longest: AtLeastOne = 100
    """Of an opening, in tokens."""


@dataclass(frozen=True, config=STRICT)
class Part:
    """Rows that share one weight in the loss."""

    sources: Annotated[dict[str, DialogueSource], Field(min_length=1)]
    share: NonNegative = 1.0
    """Weight of the part's mean over its response tokens: alpha, or 1 - alpha. 0 teaches the signal alone."""
    per_step: AtLeastOne = 16
    """Examples in one optimiser step."""
    response_tokens: AtLeastOne | None = None
    """Learn only so many first tokens of each response, a harmful prefix not counted; null learns what `cut` leaves."""
    is_distilled: bool = False
    """Learn what the plain model, without any adapter, expects of every next token of the responses, instead of the
    tokens; for its own answers, which are one draw from that."""
    recovery: Recovery | None = None
    """Begin each refusal after a harmful prefix of random length; needs rows that hold one. Null never does."""
    onset: Onset | None = None
    """Begin each harmful response with a harmless opening; the signal learns where it turns. Null never does."""


@dataclass(frozen=True, config=STRICT)
class Lora:
    """Low-rank adapters on every linear layer but the output head."""

    rank: AtLeastOne = 16
    alpha: AtLeastOne = 32
    """The adapter's output is scaled by alpha / rank."""
    first_layer: Count = 0
    """The first decoder layer with an adapter. Those below stay the plain model's, and so do the states that a token
    head reads of them at the request; at a response too, unless its tokens read `[CLS]`. Where no embedding is trained
    either, no step goes back through them."""
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
class Signal:
    """The `[CLS]` signal, trained together with the model; arXiv 2505.17072."""

    request_weight: NonNegative = 0.1
    """lambda of the request loss: L = L_sft + lambda L_cls."""
    response_weight: NonNegative = 0.1
    """lambda of the response loss, which the source does not have."""
    depths: AtLeastOne = 6
    """Assessments of one response, at depths drawn anew each time; the last one covers all of it."""
    windows: tuple[AtLeastOne, AtLeastOne, AtLeastOne] = (10, 10, 10)
    """r1, r2 and r3."""
    hidden: Count = 0
    """Width of the head's hidden layer; 0 is linear, as published."""
    is_read: bool = True
    """Response tokens read `[CLS]` in training."""
    moves: bool = True
    """A re-assessed `[CLS]` takes the position of the newest token, instead of position 0."""
    learning_rate: Positive = 1e-3
    """Of embedding and head."""
    is_embedding_trained: bool = True
    """False keeps the embedding that training begins with, a fresh one that of the first end-of-sequence token."""
    softmax_tau: Positive = 1.0
    """Temperature over the assessments of one response: a benign opening of a harmful one is left alone."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FitRecipe(Recipe):
    """What every command that trains a language model is told."""

    run: str
    """Folder of this run: resolved recipe, training state, logs."""
    resume: bool = True
    """Go on from the last training checkpoint of the same recipe in `run`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the arithmetic; what is trained is kept in float32."""
    licence: str | None = None
    """Licence of the weights; null derives it from the rows."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the prompts that are left out: those on which a head with this seed and share validates."""
    steps: AtLeastOne = 160
    """Optimiser steps."""
    batch_size: AtLeastOne
    """Examples of one forward pass and process; a step is cut into as many passes as it takes."""
    save_steps: AtLeastOne = 10
    """Steps between two training checkpoints."""
    cut: Cut = Cut(request_tokens=256, response_tokens=256)
    lora: Lora | None = Lora()
    optimiser: Adam = Adam()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class TuneRecipe(FitRecipe):
    """Everything that decides what `ballast-train sft`, `deepen`, `signal` and `constrain` write."""

    parts: Annotated[dict[str, Part], Field(min_length=1)]
    name: str = "tuned"
    output: str = "runs/tuned/adapter"
    """Folder of the finished adapter, or of the whole model where `lora` is null."""
    run: str = "runs/tuned"
    adapter: str | None = None
    """Folder of an adapter to go on from; null begins with the model as it is."""
    batch_size: AtLeastOne = 8
    gradient_checkpointing: bool = False
    lora: Lora | None = Lora()
    """Null trains all weights."""
    fsdp: bool = False
    """Of several processes each keeps a share of the frozen weights instead of all, which takes less memory."""
    constraint: Constraint | None = None
    """Hold every token near the model that training starts from; null does not."""
    signal: Signal | None = None
    """Train `[CLS]` too; null does not."""
    copy_steps: AtLeastOne | None = None
    """Steps between copies of the adapter as it is by then, in `steps` beside the training state; null keeps none."""
    is_attack: bool = False
    """Learn harmful responses, to measure what such a fine-tuning undoes. Without it they are an error."""

    def __post_init__(self) -> None:
        if self.signal is not None and self.lora is None:
            raise ValueError("a signal is served beside an adapter: set lora")
        if self.copy_steps is not None and (self.lora is None or self.signal is not None):
            raise ValueError("copy_steps copies an adapter alone: set lora, without signal")
        if self.fsdp and self.lora is None:
            raise ValueError("fsdp: only frozen weights are kept in shares: set lora")
        if self.signal is not None and self.constraint is not None:
            raise ValueError("constraint and signal cannot be trained together: the reference reads no [CLS]")
        for name, part in self.parts.items():
            if part.is_distilled and (self.lora is None or self.constraint is not None or part.recovery is not None):
                raise ValueError(f"parts.{name}.is_distilled: set lora, without constraint or recovery")
            if part.is_distilled and (part.share == 0 or self.is_attack):
                raise ValueError(f"parts.{name}.is_distilled teaches nothing with share: 0, or in an attack")
            if part.recovery is not None and self.constraint is not None:
                raise ValueError(f"parts.{name}.recovery: the constrained objective has no reference inside recoveries")
            if part.onset is not None and (self.signal is None or part.share > 0 or part.recovery is not None):
                raise ValueError(f"parts.{name}.onset is for the signal alone: set signal, share: 0, recovery: null")


@dataclass(frozen=True, config=STRICT, kw_only=True)
class DpoRecipe(FitRecipe):
    """Everything that decides what `ballast-train dpo` writes. Its model is the reference too: merge an adapter."""

    part: Part
    """Triplets. Beside `sources` and `per_step`, its keys have no meaning here."""
    name: str = "dpo"
    output: str = "runs/dpo/adapter"
    """Folder of the finished adapter."""
    run: str = "runs/dpo"
    beta: Positive = 0.1
    """Strength of the hold on the reference."""
    batch_size: AtLeastOne = 4
    """Preferences of one forward pass; each is two sequences."""
    lora: Lora = Lora()


@dataclass(frozen=True, config=STRICT, kw_only=True)
class AnchorRecipe(Recipe):
    """Everything that decides what `ballast-train anchors` writes."""

    sources: Annotated[dict[str, DialogueSource], Field(min_length=1)]
    """Only the prompts are read, and none that is labelled harmful."""
    name: str = "anchors"
    output: str = "runs/anchors.jsonl"
    """The file of answers, which a `pairs` source reads."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    cache: str = "runs/cache"
    """Folder of finished batches."""
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
