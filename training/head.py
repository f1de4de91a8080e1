"""Train the token head on cached states. The model itself is frozen, and not even loaded here.

The loop is that of transformers' `Trainer`, which brings exact resume, progress and logs.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from model.config import TokenHeadConfig
from model.safety_head import RiskHead, TokenHead
from training.config import HeadRecipe, Loss
from training.losses import request_loss, response_loss
from training.rows import Row
from training.states import RowStates, States

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Trained:
    """A trained head and how its training went."""

    head: TokenHead
    history: tuple[dict[str, float], ...]
    """What the trainer logged: loss and learning rate per epoch, and `eval_loss` on validation rows."""
    best_step: int
    """Optimiser step of the lowest validation loss; the head is of that step."""


class LabelledStates(Dataset[tuple[RowStates, Row]]):
    """Rows of one part with their states."""

    def __init__(self, rows: Sequence[Row], states: States, part: str) -> None:
        self._rows = rows
        self._states = states
        self._indices = [index for index, row in enumerate(rows) if row.part == part]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[RowStates, Row]:
        place = self._indices[index]
        return self._states[place], self._rows[place]


def collate(items: Sequence[tuple[RowStates, Row]]) -> dict[str, Tensor]:
    """Return a batch, its ragged responses padded at the end. A row without a label gets weight 0."""
    states, rows = [state for state, _ in items], [row for _, row in items]
    longest = max(1, *(len(state.response) for state in states))
    response = torch.zeros(len(items), longest, states[0].request.shape[0], dtype=torch.float16)  # (B, T, S)
    mask = torch.zeros(len(items), longest, dtype=torch.bool)  # (B, T)
    for index, state in enumerate(states):
        response[index, : len(state.response)] = state.response
        mask[index, : len(state.response)] = True
    return {
        "request_states": torch.stack([state.request for state in states]),  # (B, S)
        "response_states": response,
        "mask": mask,
        "request_labels": torch.tensor([float(row.request_label or 0) for row in rows]),
        "request_weights": torch.tensor([row.request_weight * (row.request_label is not None) for row in rows]),
        "response_labels": torch.tensor([float(row.response_label or 0) for row in rows]),
        "response_weights": torch.tensor([_response_weight(row, len(s.response)) for s, row in items]),
    }


class HeadObjective(nn.Module):
    """The head with its loss, in the shape that `Trainer` expects."""

    def __init__(self, head: TokenHead, loss: Loss, *, smoothing: float, dropout: float) -> None:
        super().__init__()
        self.head = head
        self._loss = loss
        self._smoothing = smoothing
        self._dropout = dropout

    def forward(
        self,
        request_states: Tensor,
        response_states: Tensor,
        mask: Tensor,
        request_labels: Tensor,
        request_weights: Tensor,
        response_labels: Tensor,
        response_weights: Tensor,
    ) -> dict[str, Tensor]:
        """Return the mean loss over all rows of the batch under `loss`.

        The request logit is taught at the request's last token alone, the response logit at response
        tokens alone; the head gives both everywhere.
        """
        request = self.head.request(self._dropped(request_states, self.head.request))  # (B,)
        found = self.head.response(self._dropped(response_states[mask], self.head.response))  # (sum of T,)
        response = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found)  # (B, T)
        losses = self._loss.request_weight * request_loss(request, request_labels, request_weights)
        losses = losses + response_loss(response, mask, response_labels, response_weights, self._loss, self._smoothing)
        return {"loss": losses.mean()}

    def _dropped(self, states: Tensor, head: RiskHead) -> Tensor:
        """Return the states, in training with a share of the values put back to their mean."""
        states = states.float()
        if not self.training or not self._dropout:
            return states
        return head.mean + nn.functional.dropout(states - head.mean, self._dropout)


def train(
    rows: Sequence[Row],
    states: States,
    recipe: HeadRecipe,
    width: int,
    run: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Return the head of the epoch with the lowest validation loss.

    Args:
        rows: labelled rows, those of the parts `train` and `validation` are used.
        states: their states, in the same order.
        recipe: shape, loss and optimiser.
        width: width of one hidden state (D).
        run: folder of the training state; with `recipe.resume`, its newest checkpoint is continued.
        callbacks: further callbacks of the trainer.
    """
    objective = _fresh_objective(rows, states, recipe, width)
    train_rows = LabelledStates(rows, states, "train")
    trainer = Trainer(
        model=objective,
        args=_arguments(recipe, len(train_rows), run),
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=LabelledStates(rows, states, "validation"),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=_newest_checkpoint(run, recipe.resume))
    history = tuple({k: float(v) for k, v in entry.items()} for entry in trainer.state.log_history)
    evaluated = [entry for entry in history if "eval_loss" in entry]
    best = min(evaluated, key=lambda entry: entry["eval_loss"])
    return Trained(objective.head.cpu().eval(), history, int(best["step"]))


def standardise(head: TokenHead, rows: Sequence[Row], states: States) -> None:
    """Set each risk head's mean and standard deviation to those of the training states that it reads."""
    trained = [states[index] for index, row in enumerate(rows) if row.part == "train"]
    _set_scale(head.request, (found.request[None] for found in trained))
    _set_scale(head.response, (found.response for found in trained))


def _set_scale(head: RiskHead, batches: Iterable[Tensor]) -> None:
    """Set mean and standard deviation from batches of states, (N, S) each; keep 0 and 1 if there are none."""
    count, total, squares = 0, torch.zeros_like(head.mean).double(), torch.zeros_like(head.mean).double()
    for batch in batches:
        values = batch.float()
        count += len(values)
        total += values.sum(dim=0)
        squares += values.square().sum(dim=0)
    if count:
        head.mean = (total / count).float()
        head.std = (squares / count - (total / count).square()).clamp(min=1e-8).sqrt().float()


def _newest_checkpoint(run: Path, is_resumed: bool) -> str | None:
    """Return the checkpoint to go on from; without resuming, older training state is deleted."""
    if not run.is_dir():
        return None
    if is_resumed:
        newest: str | None = get_last_checkpoint(str(run))  # type: ignore[no-untyped-call]
        return newest
    shutil.rmtree(run)
    return None


def _fresh_objective(rows: Sequence[Row], states: States, recipe: HeadRecipe, width: int) -> HeadObjective:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(recipe.seed)  # layers draw from the default generator
        head = TokenHead(TokenHeadConfig(recipe.head.layers, width, recipe.head.hidden))
    standardise(head, rows, states)
    return HeadObjective(head, recipe.loss, smoothing=recipe.acting.smoothing, dropout=recipe.optimiser.dropout)


def _arguments(recipe: HeadRecipe, num_rows: int, run: Path) -> TrainingArguments:
    settings = recipe.optimiser
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
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "label_names": ["request_labels", "response_labels"],
        "report_to": "none",
        "use_cpu": recipe.device == "cpu" or not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**choices)


def _response_weight(row: Row, num_tokens: int) -> float:
    return row.response_weight if row.response_label is not None and num_tokens else 0.0
