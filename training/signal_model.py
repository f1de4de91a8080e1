"""A language model and its `[CLS]` signal as one module: what is trained, and what a training checkpoint holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from transformers import PreTrainedModel, set_seed

from model.attention import pass_mask, pass_places
from model.cls_signal import ClsSignal, forward
from training.losses import softmax_weighted_loss
from training.steps import Example
from training.tune_config import Signal


class SignalBatch(NamedTuple):
    """What the pass of a padded batch needs, T tokens before K copies of `[CLS]`."""

    mask: Tensor
    """(B, T + K, T + K), true where a row may read."""
    places: Tensor
    """Position of every row, (B, T + K)."""
    is_copy: Tensor
    """False where a row has fewer copies than the batch, (B, K)."""
    request_labels: Tensor
    """0 or 1, (B,); -1 where nothing is known."""
    response_labels: Tensor
    """The same, (B,)."""


def collate_signal(examples: Sequence[Example], longest: int, settings: Signal, window: int | None) -> SignalBatch:
    """Return masks, positions and labels of a batch whose tokens are padded at the end to `longest`.

    Args:
        examples: what is in the batch.
        longest: T.
        settings: whether `[CLS]` is read, and which positions it takes.
        window: the model's sliding window, or None.
    """
    most = max(len(example.spans) for example in examples)
    size = longest + most
    mask = torch.eye(size, dtype=torch.bool).repeat(len(examples), 1, 1)  # padding reads itself: no empty row
    places = torch.zeros(len(examples), size, dtype=torch.long)
    is_copy = torch.zeros(len(examples), most, dtype=torch.bool)
    for row, example in enumerate(examples):
        length, num_copies = len(example.ids), len(example.spans)
        one = pass_mask(example.content, 0, length, example.spans, sliding_window=window, is_read=settings.is_read)
        kept = torch.cat([torch.arange(length), longest + torch.arange(num_copies)])  # this row's places in the batch
        mask[row, kept[:, None], kept[None]] = one[:, 1:]  # slot 0 is read by nobody: the first copy covers nothing
        places[row, kept] = torch.tensor(
            pass_places(0, length, len(example.content), example.spans, moves=settings.moves)
        )
        is_copy[row, :num_copies] = True

    def labels(found: Sequence[int | None]) -> Tensor:
        return torch.tensor([-1 if label is None else label for label in found])

    return SignalBatch(
        mask,
        places,
        is_copy,
        labels([example.request_label for example in examples]),
        labels([example.response_label for example in examples]),
    )


def request_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return L_cls of every request, (B,): the binary cross entropy of the first copy; 0 without a label.

    Source: Li & Kim 2025 (arXiv 2505.17072), L_alignment = L_sft + lambda_2 L_cls.

    Args:
        logits: request logits of all copies, (B, K); the first has read the request alone.
        labels: 0, 1 or -1, (B,).
    """
    return bce(logits[:, 0], labels.clamp(min=0).float(), reduction="none") * (labels >= 0)


def response_loss(logits: Tensor, is_copy: Tensor, labels: Tensor, tau: float) -> Tensor:
    """Return the loss of every response from its one label over its assessments, (B,); 0 without a label.

    The riskiest assessments weigh most, so the benign opening of a harmful response is left alone. The source has no
    such term: its labels are of requests.

    Args:
        logits: response logits of all copies, (B, K).
        is_copy: false where a row has fewer copies, (B, K).
        labels: 0, 1 or -1, (B,).
        tau: temperature of the weights, in logits.
    """
    is_response = is_copy.clone()
    is_response[:, 0] = False  # the first copy has read no response
    targets = labels.clamp(min=0).float()
    found = softmax_weighted_loss(logits, is_response, targets, tau=tau, is_weight_detached=True)
    return found * (labels >= 0) * is_response.any(dim=1)


class SignalModel(nn.Module):
    """A language model with its `[CLS]` signal; its state holds what is trained and nothing else.

    Args:
        model: the language model, perhaps with an adapter.
        signal: embedding and head.
    """

    def __init__(self, model: nn.Module, signal: ClsSignal) -> None:
        super().__init__()
        self.model = model
        self.signal = signal

    def __getattr__(self, name: str) -> Any:
        """Return what the trainer asks of a language model, such as how to save memory, from the language model."""
        if "checkpointing" in name:
            return getattr(self.model, name)
        return super().__getattr__(name)

    def forward(self, input_ids: Tensor, mask: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return next-token logits (B, T, V) and the logits of the copies (B, K, 2).

        Args:
            input_ids: tokens, (B, T).
            mask: true where a row may read, (B, T + K, T + K).
            places: position of every row, (B, T + K).
        """
        language_model: Any = self.model
        tokens = language_model.get_input_embeddings()(input_ids)  # (B, T, D)
        longest = input_ids.shape[1]
        copies = self.signal.embedding.to(tokens).expand(len(input_ids), mask.shape[1] - longest, -1)
        output = forward(language_model, torch.cat([tokens, copies], dim=1), mask, places, use_cache=False)
        return output.logits[:, :longest], self.signal(output.hidden_states[-1][:, longest:])

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # overloaded there
        """Return the trained parameters by name."""
        whole: dict[str, Any] = super().state_dict(*args, **kwargs)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in whole.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load trained parameters; those of the frozen model stay as they are.

        Raises:
            RuntimeError: if a trained parameter is missing, or an unknown one is there.
        """
        expected = set(self.state_dict())
        if expected != set(state_dict):
            raise RuntimeError(f"the training checkpoint holds other weights: {sorted(expected ^ set(state_dict))[:3]}")
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        found.missing_keys.clear()  # the frozen weights, which no checkpoint holds
        return found


def fresh_signal(model: PreTrainedModel, settings: Signal, seed: int) -> ClsSignal:
    """Return an untrained signal for a model: an embedding as long as a word's, and a small head."""
    table: Any = model.get_input_embeddings()
    embeddings: Tensor = table.weight.detach()
    with torch.random.fork_rng():
        set_seed(seed)  # layers draw from the global generator
        signal = ClsSignal(embeddings.shape[1], settings.hidden)
        nn.init.normal_(signal.embedding, std=float(embeddings.float().std()))
    return signal.to(embeddings.device)
