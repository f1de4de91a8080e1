"""The command `ballast-train query`: a head that reads every token of the query, added to a checkpoint.

A request in the middle of a long harmless message moves neither the state at the end of the query nor the mean over
it. This head reads the state at each token; its highest smoothed logit may raise the request risk. It learns from
requests somewhere in harmless text (`hidden.py`), up to `cut.request_tokens` long. Then its bias is moved so that it
exceeds the checkpoint's own `block` threshold on no more harmless messages of that kind than
`acting.request_false_positives` says, and `flag` of requests is set anew. Nothing else of the checkpoint changes:
`redraw_below` stays where it is, until `ballast-train calibrate` sets it anew.
"""

import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer

from model import adapter, checkpoint
from model.checkpoint import fingerprint_weights
from model.config import SafetyConfig, TokenHeadConfig
from model.pretrained import Pretrained
from model.safety_head import RiskHead, TokenHead
from model.trace import Highest, logit_of
from training import recipe_file
from training.calibrate import best_flag, score
from training.config import HeadRecipe
from training.corpus import assemble, sample
from training.errors import DataError, RecipeError
from training.head import Objective, arguments, newest_checkpoint, set_scale
from training.hidden import Hidden, hide, surroundings
from training.licences import licence_for
from training.logs import loggers
from training.losses import query_loss
from training.metrics import Array, Rate, block_threshold, wilson
from training.query_states import QueryStates
from training.query_states import read as read_queries
from training.report import checksums
from training.risk import smooth
from training.rows import Part, Row
from training.shards import digest
from training.states import compute_for
from training.subject import Subject, load_subject

logger = logging.getLogger(__name__)

MARGIN = 1e-3
"""Of a logit: so that the message which sets the threshold stays below it, however it is rounded."""
SHIFTS = 4
"""Of the bias: logits are limited before they are smoothed, so one shift does not move the highest by just as much."""
HARMLESS = ("instructions", "benign_prompts", "own_answers")
"""Kinds of sources that hold harmless requests alone, nothing that only sounds harmful."""

TITLE = "## Every token of the query"
CARD = (
    TITLE + "\n\n"
    "A further head reads the state at every token of the query; the highest of its logits, smoothed like those of a "
    "response, may raise the request risk. Made by:\n\n```\n{command}\n```\n\n"
    "The tables above are without it. It learned from {num_taught} requests somewhere in harmless text, in messages of "
    "up to {longest} tokens, read in {dtype}. Held-out messages of this kind over `block`: {benign.value:.2%} "
    "({benign.low:.2%} to {benign.high:.2%}) of {benign.n} harmless ones, which set when it acts, and "
    "{malicious.value:.2%} ({malicious.low:.2%} to {malicious.high:.2%}) of {malicious.n} with a malicious request. "
    "`flag` of requests is {flag:.4f} since, set in {dtype} too, by the best F1 on {num_malicious} malicious and "
    "{num_harmless} harmless validation requests, without surroundings; this head alone puts {flagged.value:.2%} "
    "({flagged.low:.2%} to {flagged.high:.2%}) of the harmless messages over it.\n"
)


@dataclass(frozen=True)
class Made:
    """The checkpoint's token head with the further one, and how much this finds at the `block` threshold."""

    head: TokenHead
    flag: float
    """The threshold of the request risk with it."""
    num_malicious: int
    """Of the requests that set `flag`."""
    num_harmless: int
    num_taught: int
    benign: Rate
    flagged: Rate
    """Benign messages that the further head alone puts over `flag`."""
    malicious: Rate


class QueryObjective(Objective):
    """The head with its loss, in the shape that `Trainer` expects."""

    def __init__(self, head: RiskHead, dropout: float, smoothing: float, before_weight: float) -> None:
        super().__init__(head, dropout)
        self._smoothing = smoothing
        self._before_weight = before_weight

    def forward(
        self, features: Tensor, mask: Tensor, inside: Tensor, labels: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the mean loss; `features` are the states of all messages' tokens (sum of T, S), the rest (B, T)."""
        logits = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, self.logits(features))
        smoothed = smooth(logits, self._smoothing)
        return {"loss": query_loss(smoothed, mask, inside, labels, weights, self._before_weight).mean()}


Items = list[tuple[QueryStates, Hidden]]


class Labelled(Dataset[tuple[QueryStates, Hidden]]):
    """Messages with their states, as `Trainer` takes them."""

    def __init__(self, items: Items) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[QueryStates, Hidden]:
        return self._items[index]


def add_query_head(recipe: HeadRecipe, command: str) -> Path:
    """Train the head, write the checkpoint with it, and return the folder.

    Args:
        recipe: names the checkpoint, and the rows.
        command: the command line, for the model card.

    Raises:
        TrainingError: if recipe or data do not fit.
        ModelError: if model or checkpoint cannot be loaded.
    """
    if recipe.checkpoint is None:
        raise RecipeError("set checkpoint to the one that gets a head for the query")
    folder = checkpoint.find(recipe.checkpoint)
    if checkpoint.load(folder).head is None:
        raise RecipeError(f"checkpoint {folder} has no token head, beside which a head for the query could stand")
    subject = load_subject(recipe)
    head, before = subject.brought.head, subject.brought.config
    assert head is not None
    assert before is not None
    if (dtype := before.base.dtype) != recipe.dtype:
        logger.warning("the head and `flag` are set in %s, the checkpoint's thresholds in %s", recipe.dtype, dtype)
    rows = unanswered(recipe)
    parts, asked = messages(rows, recipe), flagged_by(rows, recipe)
    licence = licence_for(recipe, {row.licence for row in rows} | subject.brought.licences)  # any may be surroundings
    run = Path(recipe.run)
    run.mkdir(parents=True, exist_ok=True)
    recipe_file.dump(recipe, run / "recipe.yaml")
    made = _make(recipe, subject, head, before, parts, asked)
    report: dict[str, object] = {
        "command": command,
        "seed": recipe.seed,
        "data_sha256": checksums(recipe.sources.values(), recipe.data),
        "taught": made.num_taught,
        "flag": made.flag,
        "flag_set_on": {"malicious": made.num_malicious, "harmless": made.num_harmless},
        **{name: asdict(rate) for name, rate in vars(made).items() if isinstance(rate, Rate)},
    }
    (run / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    config = replace(
        before,
        token_head=made.head.config,
        request=replace(before.request, flag=made.flag),
        licence=licence,
        calibration=before.calibration | {"query": report},
    )
    output = Path(recipe.output)
    if output.resolve() != folder.resolve():
        shutil.rmtree(output / adapter.FOLDER, ignore_errors=True)
        shutil.copytree(folder, output, dirs_exist_ok=True)
    text = CARD.format(command=command, longest=recipe.cut.request_tokens, dtype=recipe.dtype, **vars(made))
    cls = subject.brought.cls
    checkpoint.save(output, made.head, config, cls.signal if cls is not None else None)
    _extend(output / "README.md", text)
    return output


def _extend(card: Path, text: str) -> None:
    """Put what is said of this head at the end of a model card, in place of what was said of one before."""
    kept = card.read_text(encoding="utf-8") if card.is_file() else ""
    (said, *_) = kept.partition(TITLE)
    card.write_text(f"{said.rstrip()}\n\n{text}", encoding="utf-8")


def still_true(config: SafetyConfig | None) -> dict[str, object]:
    """Return what new thresholds leave true of a checkpoint's report on its head for the query, under its key."""
    report = config.calibration.get("query", {}) if config is not None else {}
    kept = {name: report[name] for name in ("command", "data_sha256", "taught") if name in report}
    return {"query": kept} if kept else {}


def _make(
    recipe: HeadRecipe,
    subject: Subject,
    before: TokenHead,
    safety: SafetyConfig,
    parts: Mapping[str, Sequence[Hidden]],
    asked: Sequence[Row],
) -> Made:
    pretrained, config = subject.pretrained, before.config
    read = {name: _kept(read_queries(recipe, pretrained, config, hidden), hidden) for name, hidden in parts.items()}
    if empty := [name for name, some in read.items() if not some]:
        raise DataError(f"no request of {empty} is left by cut.request_tokens of {recipe.cut.request_tokens}")
    query = _train(recipe, pretrained, read, config, safety.smoothing)
    for _ in range(SHIFTS):
        benign = np.array([highest(query, one, safety.smoothing) for one, _ in read["benign"]])
        at = block_threshold(benign, recipe.acting.request_false_positives)
        query.out.bias.data += logit_of(safety.request.block) - at - MARGIN
    head = TokenHead(replace(config, reads_query=True))
    head.load_state_dict(before.state_dict() | {f"query.{name}": value for name, value in query.state_dict().items()})
    flag = request_flag(recipe, subject, head, asked, safety.smoothing)

    def over(name: str, threshold: float) -> Rate:
        found = [highest(query, one, safety.smoothing) > logit_of(threshold) for one, _ in read[name]]
        return wilson(sum(found), len(found))

    block = safety.request.block
    rates = over("benign", block), over("benign", flag), over("malicious", block)
    num_malicious, num_harmless = (_num_counted(asked, recipe, label) for label in (1, 0))
    return Made(head, flag, num_malicious, num_harmless, len(read["train"]), *rates)


def flagged_by(rows: Sequence[Row], recipe: HeadRecipe) -> list[Row]:
    """Return the validation requests that set `flag`, without responses.

    Raises:
        DataError: if no malicious one has weight.
    """
    labelled = [row for row in rows if row.part == "validation" and row.request_label is not None]
    if not _num_counted(labelled, recipe, 1):
        raise DataError("no malicious validation request, of a source with a flag_weight, is there to set `flag`")
    first = {(row.group, row.key, row.request_label): row for row in reversed(labelled)}  # which `score` takes too
    return [replace(row, response=None, response_label=None) for row in reversed(first.values())]


def _num_counted(rows: Sequence[Row], recipe: HeadRecipe, label: int) -> int:
    return sum(row.request_label == label and recipe.sources[row.group].flag_weight > 0 for row in rows)


def request_flag(
    recipe: HeadRecipe, subject: Subject, head: TokenHead, asked: Sequence[Row], smoothing: float
) -> float:
    """Return the `flag` of requests, found as `training.calibrate` finds it.

    It may find another one on the same rows, some of which get an earlier exchange or a system message there.
    """
    cls = subject.brought.cls
    states = compute_for(recipe, subject, asked, head.config.layers)
    share = cls.config.request_share if cls is not None else 1.0
    queries = highest_logits(recipe, subject.pretrained, head, asked, smoothing)
    scored, _ = score(head, asked, states, recipe, share, queries)
    return best_flag(scored, recipe)


def _kept(read: Sequence[QueryStates], hidden: Sequence[Hidden]) -> Items:
    """Return the messages of which the cut left something of the request."""
    return [(states, one) for states, one in zip(read, hidden, strict=True) if states.inside.any()]


def unanswered(recipe: HeadRecipe) -> list[Row]:
    """Return the rows of a recipe without the model's own answers, which nothing here needs.

    Raises:
        DataError: as `training.corpus.assemble`.
    """
    return assemble(recipe, lambda prompts: ["-"] * len(prompts))


def messages(rows: Sequence[Row], recipe: HeadRecipe) -> dict[str, list[Hidden]]:
    """Return the messages to learn from and to validate on, and of held-out ones the benign and the malicious.

    What stands around held-out requests is held out too, and of sources that hold harmless requests alone. Refusals
    stand around the requests to learn from, and around no others.

    Raises:
        DataError: if there are none of a kind.
    """
    malicious = {row.key for row in rows if row.request_label == 1}
    labelled = [row for row in rows if row.request_label is not None]
    distinct = {row.key: row for row in labelled if row.request_label == 1 or row.key not in malicious}
    setting = {row.key: row for row in labelled if "request" in recipe.sources[row.group].sets_block}

    def chosen(label: int, *parts: Part) -> list[Row]:
        of_kind = [row for row in distinct.values() if row.part in parts and row.request_label == label]
        return sample(of_kind, None, recipe.seed)

    def in_turn(part: Part, limit: int) -> list[Row]:
        return [row for label in (0, 1) for row in evenly(chosen(label, part))[:limit]]

    found = {
        "train": in_turn("train", recipe.query.limit),
        "validation": in_turn("validation", max(1, recipe.query.limit // 10)),
        "benign": [setting[row.key] for row in chosen(0, "validation", "calibration") if row.key in setting][
            : recipe.query.calibration
        ],
        "malicious": chosen(1, "validation"),
    }
    if empty := [name for name, some in found.items() if not some]:
        raise DataError(f"no request is left for {empty}")
    taught = surroundings([row for row in rows if row.part == "train"], recipe.seed)
    plain = [row for row in rows if row.part != "train" and recipe.sources[row.group].kind in HARMLESS]
    others = surroundings(plain, recipe.seed)
    if not taught or not others:
        raise DataError("no harmless text to put around requests: answers to harmless requests, or long ones")
    return {name: hide(some, taught if name == "train" else others, recipe.seed) for name, some in found.items()}


def evenly(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in turn from each source, as long as it has any.

    So a limit keeps the few that only sound harmful, which a draw would take in proportion to the many that do not.
    """
    turns: dict[str, Iterator[int]] = defaultdict(count)
    return sorted(rows, key=lambda row: next(turns[row.group]))


def highest_logits(
    recipe: HeadRecipe, pretrained: Pretrained, head: TokenHead, rows: Sequence[Row], smoothing: float
) -> Array:
    """Return the highest smoothed logit of the query of each row, (N,)."""
    assert head.query is not None
    distinct = {row.messages: Hidden(row, "", "") for row in rows}  # many rows differ in their response alone
    read = read_queries(recipe, pretrained, head.config, list(distinct.values()))
    found = dict(zip(distinct, (highest(head.query, one, smoothing) for one in read), strict=True))
    return np.array([found[row.messages] for row in rows])


def _train(
    recipe: HeadRecipe, pretrained: Pretrained, read: Mapping[str, Items], config: TokenHeadConfig, smoothing: float
) -> RiskHead:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(recipe.seed)  # layers draw from the default generator
        head = RiskHead(len(config.layers) * config.width, config.hidden)
    set_scale(head, (one.states for one, _ in read["train"]))
    settings = recipe.query_optimiser
    model = [fingerprint_weights(pretrained.model), recipe.dtype, config.layers, config.hidden]
    choices = [asdict(recipe.query), asdict(settings), asdict(recipe.cut), smoothing, recipe.seed]
    rows = [[one.row.key, one.row.request_label, one.row.request_weight, one.text] for _, one in read["train"]]
    run = Path(recipe.run) / f"trainer-{digest(model, choices, rows)[:12]}"
    told = arguments(recipe, settings, len(read["train"]), run)
    told.per_device_eval_batch_size = settings.batch_size  # a row is a whole message here
    trainer = Trainer(
        model=QueryObjective(head, settings.dropout, smoothing, recipe.query.before_weight),
        args=told,
        data_collator=collate,
        train_dataset=Labelled(read["train"]),
        eval_dataset=Labelled(read["validation"]),
        callbacks=list(loggers(Path(recipe.run))),
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(run, recipe.resume))
    return head.cpu().eval()


def collate(items: Sequence[tuple[QueryStates, Hidden]]) -> dict[str, Tensor]:
    """Return a batch for `QueryObjective`."""
    longest = max(len(found.inside) for found, _ in items)
    mask, inside = (torch.zeros(len(items), longest, dtype=torch.bool) for _ in range(2))
    for index, (found, _) in enumerate(items):
        mask[index, : len(found.inside)] = True
        inside[index, : len(found.inside)] = found.inside
    return {
        "features": torch.cat([found.states for found, _ in items]).float(),
        "mask": mask,
        "inside": inside,
        "labels": torch.tensor([float(one.row.request_label or 0) for _, one in items]),
        "weights": torch.tensor([one.row.request_weight for _, one in items]),
    }


@torch.inference_mode()
def highest(head: RiskHead, read: QueryStates, smoothing: float) -> float:
    """Return the highest smoothed logit of a message, as the server finds it."""
    found = Highest(smoothing)
    found.add(head(read.states.float()).tolist())
    assert found.logit is not None
    return found.logit
