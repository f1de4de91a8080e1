"""Train the token head on cached states. The model itself is frozen, and not even loaded here.

The loop is that of transformers' `Trainer`, which brings exact resume, progress and logs.
"""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from model.config import Side, TokenHeadConfig
from model.safety_head import RiskHead, TokenHead
from training.config import HeadRecipe, Loss, Optimiser
from training.errors import DataError
from training.losses import request_loss, response_loss
from training.rows import Row
from training.states import RowStates, States

EVALUATION_BATCH = 256
SIDES: tuple[Side, ...] = ("request", "response")


@dataclass(frozen=True)
class Trained:
    """A trained head and how its training went."""

    head: TokenHead | None
    """None where only `[CLS]` is calibrated."""
    history: dict[Side, tuple[dict[str, float], ...]]
    """Empty where nothing was trained.

    Per side, what the trainer logged: loss and learning rate per epoch, `eval_loss` on validation rows."""


class LabelledStates(Dataset[tuple[RowStates, Row]]):
    """Rows of one part that teach one side, with their states."""

    def __init__(self, rows: Sequence[Row], states: States, part: str, side: Side) -> None:
        self._rows = rows
        self._states = states
        self._indices = [
            index
            for index, row in enumerate(rows)
            if row.part == part and _teaches(row, side) and (side == "request" or len(states[index].response))
        ]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[RowStates, Row]:
        place = self._indices[index]
        return self._states[place], self._rows[place]


def pad(items: Sequence[RowStates]) -> tuple[Tensor, Tensor]:
    """Return what the response head reads of some rows, (sum of T, 2 * S), and which is whose, (B, T)."""
    longest = max(1, *(len(states.response) for states in items))
    mask = torch.zeros(len(items), longest, dtype=torch.bool)
    for index, states in enumerate(items):
        mask[index, : len(states.response)] = True
    return torch.cat([states.passage() for states in items]), mask


def collate_requests(items: Sequence[tuple[RowStates, Row]]) -> dict[str, Tensor]:
    """Return a batch for `RequestObjective`."""
    return {
        "features": torch.stack([states.request for states, _ in items]).float(),
        "labels": torch.tensor([float(row.request_label or 0) for _, row in items]),
        "weights": torch.tensor([row.request_weight for _, row in items]),
    }


def collate_responses(items: Sequence[tuple[RowStates, Row]]) -> dict[str, Tensor]:
    """Return a batch for `ResponseObjective`."""
    features, mask = pad([states for states, _ in items])
    openings = torch.tensor([row.opening_tokens for _, row in items])
    return {
        "features": features,
        "mask": mask,
        "counted": mask & (torch.arange(mask.shape[1]) >= openings[:, None]),
        "labels": torch.tensor([float(row.response_label or 0) for _, row in items]),
        "weights": torch.tensor([row.response_weight for _, row in items]),
    }


class Objective(nn.Module):
    """A risk head with dropout on its standardised features."""

    def __init__(self, head: RiskHead, dropout: float) -> None:
        super().__init__()
        self.head = head
        self._dropout = dropout

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (N,) of features (N, F); in training a share of them is put back to its mean."""
        if self.training and self._dropout:
            features = self.head.mean + nn.functional.dropout(features - self.head.mean, self._dropout)
        found: Tensor = self.head(features)
        return found


class RequestObjective(Objective):
    """The request head with its loss, in the shape that `Trainer` expects."""

    def forward(self, features: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the mean loss over the rows; `features` are read at each request's last token, (B, 2 * S)."""
        return {"loss": request_loss(self.logits(features), labels, weights).mean()}


class ResponseObjective(Objective):
    """The response head with its loss, in the shape that `Trainer` expects."""

    def __init__(self, head: RiskHead, dropout: float, loss: Loss, smoothing: float) -> None:
        super().__init__(head, dropout)
        self._loss = loss
        self._smoothing = smoothing

    def forward(
        self, features: Tensor, mask: Tensor, counted: Tensor, labels: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """Return the mean loss over the rows.

        Args:
            features: as `pad` returns them, (sum of T, 2 * S).
            mask: likewise, (B, T).
            counted: the positions of which the labels speak, (B, T).
            labels: 1 for harmful, 0 for harmless, (B,).
            weights: weight of each row, (B,).
        """
        logits = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, self.logits(features))  # (B, T)
        return {"loss": response_loss(logits, counted, labels, weights, self._loss, self._smoothing).mean()}


def train(
    rows: Sequence[Row],
    states: States,
    recipe: HeadRecipe,
    width: int,
    run: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Return the head after the recipe's epochs.

    The sides share no weight, so each is trained on its own: they overfit at different speeds. The validation
    loss is logged and chooses nothing: it is noisy, and an early epoch of a falling learning rate is worse.

    Args:
        rows: labelled rows, those of the parts `train` and `validation` are used.
        states: their states, in the same order.
        recipe: shape, loss and optimisers.
        width: width of one hidden state (D).
        run: folder of the training state; with `recipe.resume`, its newest checkpoints are continued.
        callbacks: further callbacks of the trainers.

    Raises:
        DataError: if a side has no row to train or to validate on.
    """
    head = _fresh_head(rows, states, recipe, width)
    histories: dict[Side, tuple[dict[str, float], ...]] = {}
    for side in SIDES:
        parts = {part: LabelledStates(rows, states, part, side) for part in ("train", "validation")}
        if empty := [part for part, found in parts.items() if not len(found)]:
            raise DataError(f"no row teaches the {side} side in the {empty[0]} part")
        histories[side] = _train_side(side, head, parts, recipe, run / side, callbacks)
    return Trained(head.cpu().eval(), histories)


def _train_side(
    side: Side,
    head: TokenHead,
    parts: Mapping[str, LabelledStates],
    recipe: HeadRecipe,
    run: Path,
    callbacks: Sequence[TrainerCallback],
) -> tuple[dict[str, float], ...]:
    """Train one side of `head` in place and return the trainer's log."""
    settings = recipe.request_optimiser if side == "request" else recipe.response_optimiser
    objective = (
        RequestObjective(head.request, settings.dropout)
        if side == "request"
        else ResponseObjective(head.response, settings.dropout, recipe.loss, recipe.acting.smoothing)
    )
    trainer = Trainer(
        model=objective,
        args=arguments(recipe, settings, len(parts["train"]), run),
        data_collator=collate_requests if side == "request" else collate_responses,
        train_dataset=parts["train"],
        eval_dataset=parts["validation"],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=newest_checkpoint(run, recipe.resume))
    return tuple({k: float(v) for k, v in entry.items()} for entry in trainer.state.log_history)


def standardise(head: TokenHead, rows: Sequence[Row], states: States) -> None:
    """Set each risk head's mean and standard deviation to those of the training features that it reads."""
    trained = [states[index] for index, row in enumerate(rows) if row.part == "train"]
    set_scale(head.request, (found.request[None] for found in trained))
    set_scale(head.response, (found.passage() for found in trained))


def set_scale(head: RiskHead, batches: Iterable[Tensor]) -> None:
    """Set mean and standard deviation from batches of features, (N, F) each; keep 0 and 1 if there are none."""
    count, total, squares = 0, torch.zeros_like(head.mean).double(), torch.zeros_like(head.mean).double()
    for batch in batches:
        values = batch.float()
        count += len(values)
        total += values.sum(dim=0)
        squares += values.square().sum(dim=0)
    if count:
        head.mean = (total / count).float()
        head.std = (squares / count - (total / count).square()).clamp(min=1e-8).sqrt().float()


def newest_checkpoint(run: Path, is_resumed: bool) -> str | None:
    """Return the checkpoint to go on from; without resuming, older training state is deleted."""
    if not run.is_dir():
        return None
    if is_resumed:
        newest: str | None = get_last_checkpoint(str(run))  # type: ignore[no-untyped-call]  # untyped
        return newest
    shutil.rmtree(run)
    return None


def _fresh_head(rows: Sequence[Row], states: States, recipe: HeadRecipe, width: int) -> TokenHead:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(recipe.seed)  # layers draw from the default generator
        head = TokenHead(TokenHeadConfig(recipe.head.layers, width, recipe.head.hidden))
    standardise(head, rows, states)
    return head


def arguments(recipe: HeadRecipe, settings: Optimiser, num_rows: int, run: Path) -> TrainingArguments:
    """Return what a `Trainer` is told: the recipe's seed and device, the optimiser's settings, steps for the rows."""
    num_steps = settings.epochs * -(-num_rows // settings.batch_size)
    choices: dict[str, Any] = {
        "output_dir": str(run),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": EVALUATION_BATCH,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": "cosine",
        "warmup_steps": round(settings.warmup * num_steps),
        "seed": recipe.seed,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "save_total_limit": 2,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "use_cpu": recipe.device == "cpu" or not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**choices)


def _teaches(row: Row, side: Side) -> bool:
    return (row.request_label if side == "request" else row.response_label) is not None
