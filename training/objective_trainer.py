"""The trainer of every objective.

The loss of a step is a sum over its tokens, each with the weight that `steps.py` gave it, so it does not depend on the
batch size or the number of processes.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from training import fsdp
from training.common_start import num_common, read_once
from training.objectives import IGNORED, betas, constrained_loss, divergences, positions, token_logprobs
from training.output_head import predicting
from training.signal_model import SignalModel, joint_loss, request_loss, response_loss, turn_loss
from training.tune_config import Constraint, Signal


class ObjectiveTrainer(Trainer):
    """A trainer whose loss is the weighted sum over tokens.

    Args:
        constraint: hold each token near the reference that the batches bring; None is plain cross entropy.
        signal: weights of the signal's losses; None trains the language model alone.
        distils: some examples are learned as the plain model expects them.
        reads_common_once: read the tokens that all rows of a pass begin with once, as `common_start.py` does.
        per_step: examples of one step.
        is_shared: the model's frozen weights are in shares, as `fsdp.py` has them.
    """

    def __init__(
        self,
        *args: Any,
        constraint: Constraint | None,
        signal: Signal | None,
        distils: bool,
        reads_common_once: bool,
        per_step: int,
        is_shared: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._distils = distils
        self._reads_common_once = reads_common_once
        self._constraint = constraint
        self._signal = signal
        self._per_step = per_step
        self._is_shared = is_shared
        self._terms: dict[str, Tensor] = {}
        if is_shared:
            fsdp.prepare(self)
        self.model_accepts_loss_kwargs = True  # with labels in the batch: the loss is not divided by a step's passes
        self.loss_is_scaled_for_ga = True

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Run one pass and its gradients; with the last pass of a step they are averaged where no wrapper does so."""
        loss: Tensor = super().training_step(model, *args, **kwargs)
        if self._is_shared and self.accelerator.sync_gradients:
            fsdp.average_gradients(model)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the batch's share of the step's loss, and with `return_outputs` the model's output too."""
        is_learned = _learned(inputs)  # (B, T); N of them
        row = is_learned.nonzero()[:, 0]  # (N,)
        outputs = self._outputs(model, inputs, is_learned)
        logits: Tensor = outputs[0]  # (N, V)
        logprobs = token_logprobs(logits, inputs["labels"][is_learned])  # (N,)
        per_token = -logprobs
        if self._distils:
            rows = _distilled(inputs)
            chosen = torch.isin(row, rows)
            divergence = divergences(logits[chosen], self._plain_logits(model, inputs, rows, is_learned))
            is_distilled = inputs["is_distilled"][row[chosen]]
            per_token = per_token.index_put((chosen,), torch.where(is_distilled, divergence, per_token[chosen]))
        if self._constraint is not None:
            beta = betas(positions(inputs["labels"])[is_learned], **asdict(self._constraint))
            per_token = constrained_loss(logprobs, inputs["reference"][is_learned], beta)
        loss = (inputs["weights"][row] * per_token).sum()
        if self._signal is not None:
            request, response = _signal_losses(outputs[1], inputs, self._signal)
            means = request.sum() / self._per_step, response.sum() / self._per_step
            self._note(loss_sft=loss, loss_request=means[0], loss_response=means[1])
            loss = joint_loss(loss, request, response, self._signal, self._per_step)
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes; the loss is a sum
        return (loss, outputs) if return_outputs else loss

    def _note(self, **terms: Tensor) -> None:
        """Add to what is logged of a step beside its loss: each term's share, before its lambda."""
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + term.detach() * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a step with the terms of its loss, which are those of all processes as it is."""
        if "loss" in logs:
            logs |= {name: float(self.accelerator.reduce(total, "mean")) for name, total in self._terms.items()}
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def _outputs(self, model: nn.Module, inputs: dict[str, Any], is_learned: Tensor) -> Any:
        """Return the model's output, which begins with the logits that the learned tokens are drawn from, (N, V)."""
        if self._signal is not None:
            return model(inputs["input_ids"], masks=inputs["masks"], places=inputs["places"], is_learned=is_learned)
        ids, inner = inputs["input_ids"], self.accelerator.unwrap_model(model)

        def run(which: slice, tokens: slice, **cached: Any) -> Any:
            mask = inputs["attention_mask"][which, : tokens.stop]
            with predicting(inner, is_learned[which, tokens]):
                return model(input_ids=ids[which, tokens], attention_mask=mask, return_dict=False, **cached)

        common = num_common(ids, is_learned, {}) if self._reads_common_once else 0
        return read_once(inner, run, len(ids), common)

    @torch.no_grad()
    def _plain_logits(self, model: nn.Module, inputs: dict[str, Any], rows: Tensor, is_learned: Tensor) -> Tensor:
        """Return the logits of some rows from the model without adapter, whose tokens read no `[CLS]`, (N', V)."""
        length = inputs["input_ids"].shape[1]
        chosen = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
        if self._signal is not None:
            masks = {kind: mask[rows] for kind, mask in inputs["masks"].items()}
            for mask in masks.values():
                mask[:, :length, length:] = False
            chosen |= {"masks": masks, "places": inputs["places"][rows]}
        inner = self.accelerator.unwrap_model(model)
        adapted: Any = inner.model if isinstance(inner, SignalModel) else inner
        was_training = model.training
        with adapted.disable_adapter():
            found: Tensor = self._outputs(model.eval(), chosen, is_learned[rows])[0]
        model.train(was_training)
        return found


def _signal_losses(logits: Tensor, inputs: Mapping[str, Tensor], settings: Signal) -> tuple[Tensor, Tensor]:
    """Return the losses of the signal, of the request and of the response of every row, (B,) each."""
    request = request_loss(logits[..., 0], inputs["request_labels"])
    of_copies = logits[..., 1]  # (B, K)
    response = response_loss(of_copies, inputs["is_copy"], inputs["response_labels"], settings.softmax_tau)
    return request, response + turn_loss(of_copies, inputs["span_labels"])  # a row has labels of one kind only


def _distilled(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the numbers of the distilled rows, (R,), or the first one's where there is none.

    Processes that share the model must all run it equally often.
    """
    found = inputs["is_distilled"].nonzero()[:, 0]
    return found if len(found) else found.new_zeros(1)


def _learned(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return which tokens weigh something in the loss, (B, T)."""
    return (inputs["labels"] != IGNORED) & (inputs["weights"] > 0)[:, None]
