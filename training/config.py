"""The recipe of a token head: every choice of a run, frozen. `recipe_file.py` reads it from YAML."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from model.config import Side

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Kind = Literal["responses", "triplets", "refusals", "instructions", "prompts", "benign_prompts", "own_answers"]
"""Which documented file a source looks like; `own_answers` are prompts that the served model answers."""

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Source:
    """Rows of one origin: where they are, what they mean, and how much they count."""

    path: str
    """A .jsonl file, or a .yaml file of templates, relative to the recipe's `data`; or a Hub id."""
    kind: Kind
    match: str = ""
    """Keep only rows whose `source` begins with this."""
    without: tuple[str, ...] = ()
    """Files of rows whose prompts are left out, such as those that the model was tuned on."""
    limit: Count | None = None
    """Rows to sample, those of `calibration` included; null takes all."""
    calibration: Count = 0
    """Of these, rows that are kept from training and serve the thresholds alone."""
    request_label: Literal[0, 1] | None = None
    """Label of every request of a `responses` source, where it is known."""
    request_weight: NonNegative = 1.0
    """Weight of a row in the request loss."""
    response_weight: NonNegative = 1.0
    """Weight of a row in the response loss."""
    sets_block: tuple[Side, ...] = ()
    """The sides whose `block` threshold the benign held-out rows of this source decide.

    Two sources with the same prompts must not both set the request side: each prompt would count twice.
    """
    flag_weight: NonNegative = 1.0
    """Weight of the whole source where the best F1 is sought, whatever its number of rows."""
    credit: str = ""
    """`Name (LICENCE)` for rows without a `source` field."""
    split: str = "train"
    """Split of a Hub data set."""

    def __post_init__(self) -> None:
        if self.request_label is not None and self.kind != "responses":
            raise ValueError(f"request_label belongs to kind 'responses', {self.kind!r} says it itself")


@dataclass(frozen=True, config=STRICT)
class Answers:
    """How the served model answers the prompts of `own_answers` sources."""

    temperature: Positive = 0.7
    max_tokens: AtLeastOne = 128
    batch_size: AtLeastOne = 32


@dataclass(frozen=True, config=STRICT)
class Augment:
    """Shares of rows, drawn without regard to their labels."""

    history: Share = 0.1
    """Rows that get an earlier, benign exchange in front."""
    system: Share = 0.1
    """Rows that get a system message."""
    rephrase: Annotated[int, Field(ge=0, le=12)] = 4
    """Other forms in which a "How do I ...?" request is taught too; see `rephrase.py`."""
    rephrase_weight: NonNegative = 0.5
    """Weight of each in the request loss."""
    surround: Share = 0.0
    """Requests that are taught too with harmless text around them, or asked for and then only assented to."""
    surround_weight: NonNegative = 1.0
    """Weight of each in the request loss."""
    disguise: Share = 0.0
    """Requests that are taught too in a role, a story or the like; see `disguise.py`."""
    disguise_weight: NonNegative = 1.0
    """Weight of each in the request loss."""
    onset: Share = 0.0
    """Responses that are taught too after a harmless opening; see `onsets.py`."""


@dataclass(frozen=True, config=STRICT)
class Cut:
    """How much of a row is read, in tokens."""

    request_tokens: AtLeastOne = 512
    """Longer requests lose their beginning."""
    response_tokens: AtLeastOne = 256
    """Longer responses lose their end."""


@dataclass(frozen=True, config=STRICT)
class Head:
    """Shape of the token head."""

    layers: tuple[int, ...] = (-1,)
    """Whose states it reads: -1 is the final one. An empty list spreads up to six over a model of any depth, the
    final one and those that `head_all_rows` reads of 30."""
    hidden: Count = 64
    """Width of the hidden layer per risk; 0 is a linear head."""


@dataclass(frozen=True, config=STRICT)
class Loss:
    """Weights of the terms of the response loss; see `losses.py`."""

    softmax_weight: NonNegative = 1.0
    mean_weight: NonNegative = 0.1
    tau: Positive = 1.0
    """Temperature of the softmax over positions, in logits."""
    first_position: AtLeastOne = 4
    """Response tokens that must be there before a position counts."""
    is_weight_detached: bool = True
    """Treat the softmax weights as constants, so that no gradient moves weight between positions."""


@dataclass(frozen=True, config=STRICT)
class Optimiser:
    """AdamW with a cosine schedule."""

    epochs: AtLeastOne = 15
    batch_size: AtLeastOne = 64
    learning_rate: Positive = 1e-3
    weight_decay: NonNegative = 0.01
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """On the standardised states."""


@dataclass(frozen=True, config=STRICT)
class Query:
    """What the head that reads every token of the query learns from; see `hidden.py`."""

    limit: AtLeastOne = 2000
    """Most requests of either label to learn from, in turn from each source."""
    calibration: AtLeastOne = 500
    """Most harmless held-out requests that decide when it acts."""
    before_weight: NonNegative = 0.5
    """Weight of the harmless text before a malicious request."""


@dataclass(frozen=True, config=STRICT)
class Acting:
    """What the policy will do with the risks; the thresholds are calibrated on exactly this."""

    smoothing: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Weight of the newest logit in the moving average; the response loss uses it too."""
    patience: AtLeastOne = 3
    lookback: Count = 8
    request_false_positives: Share = 0.002
    """Share of benign requests that `block` may refuse."""
    response_false_positives: Share = 0.002
    """Share of benign responses that `block` may stop."""
    redraw_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of benign requests at which a refusal that the model begins with by itself is drawn again; at those of a
    higher request risk it stands. Null lets every one stand."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class Recipe:
    """What every command that reads rows is told. Recipes say what is particular to theirs."""

    name: str
    output: str
    model: str = "smollm2-135m"
    device: str = "auto"
    """A torch device; `auto` takes the GPU where there is one."""
    data: str = "data/train"
    """Folder of the sources' files."""
    seed: int = 0
    is_permissive_only: bool = False
    """Use only rows under MIT, Apache or CC-BY."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class HeadRecipe(Recipe):
    """Everything that decides what `ballast-train head`, `calibrate` and `query` write."""

    sources: Annotated[dict[str, Source], Field(min_length=1)]
    name: str = "head"
    adapter: str | None = None
    """Folder of an adapter that is added to the model, and goes into the checkpoint, with a `[CLS]` signal if one lies
    beside it; null takes the model as it is."""
    checkpoint: str | None = None
    """Of `ballast-train calibrate` and `query`: the checkpoint to get new thresholds, or a further head and `flag`."""
    schedule: str | None = None
    """When a `[CLS]` signal will be assessed while a response is generated, as `model.schedule.parse` reads it; null
    takes the checkpoint's, or `annealed`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    output: str = "runs/head/checkpoint"
    """Folder of the finished checkpoint."""
    run: str = "runs/head"
    """Folder of this run: resolved recipe, checksums, training state, logs."""
    cache: str = "runs/cache"
    """Folder of states and answers; runs may share it."""
    resume: bool = True
    """Go on from the last training checkpoint of the same recipe in `run`."""
    licence: str | None = None
    """Licence of the weights; null derives it from the rows."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that choose the `flag` thresholds, and on which the loss is logged."""
    batch_tokens: AtLeastOne = 4096
    """Tokens of one forward pass, padding included."""
    answers: Answers = Answers()
    augment: Augment = Augment()
    cut: Cut = Cut()
    head: Head = Head()
    loss: Loss = Loss()
    request_optimiser: Optimiser = Optimiser()
    response_optimiser: Optimiser = Optimiser()
    query: Query = Query()
    query_optimiser: Optimiser = Optimiser(epochs=6, batch_size=32, dropout=0.3, weight_decay=1.0)
    acting: Acting = Acting()
