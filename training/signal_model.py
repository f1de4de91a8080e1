"""A language model and its `[CLS]` signal as one module: what is trained, and what a training checkpoint holds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from transformers import PreTrainedModel, set_seed

from model.attention import Span, pass_mask, pass_places
from model.cls_signal import ClsSignal, Masks, forward
from training.common_start import num_common, read_once
from training.losses import softmax_weighted_loss
from training.output_head import predicting
from training.steps import Example
from training.tune_config import Signal


class SignalBatch(NamedTuple):
    """What the pass of a padded batch needs, T tokens before K copies of `[CLS]`."""

    masks: Masks
    """(B, T + K, T + K) by kind of layer, true where a row may read."""
    places: Tensor
    """Position of every row, (B, T + K)."""
    is_copy: Tensor
    """False where a row has fewer copies than the batch, (B, K)."""
    request_labels: Tensor
    """0 or 1, (B,); -1 where nothing is known."""
    response_labels: Tensor
    """The same, (B,)."""
    span_labels: Tensor
    """The same of each copy, for responses that turn, (B, K)."""


def padded_masks(
    contents: Sequence[Sequence[bool]],
    lengths: Sequence[int],
    spans: Sequence[Sequence[Span]],
    *,
    windows: Mapping[str, int | None],
    is_read: bool,
    moves: bool,
) -> tuple[Masks, Tensor, Tensor]:
    """Return masks, positions and real copies of a batch: T tokens padded at the end, then K copies of `[CLS]`.

    Args:
        contents: for every request token of each row, whether it is the client's text.
        lengths: tokens of each row, the longest has T.
        spans: assessments of each row, the first of which covers nothing.
        windows: the model's sliding windows, by kind of layer.
        is_read: response tokens read `[CLS]`.
        moves: as `pass_places` takes it.

    Returns:
        Where a row may read, (B, T + K, T + K) by kind of layer; the position of every row, (B, T + K); which copies a
        row has, (B, K).
    """
    longest, most = max(lengths), max(map(len, spans))
    size = longest + most
    # Padding reads itself: no empty row.
    masks = {kind: torch.eye(size, dtype=torch.bool).repeat(len(lengths), 1, 1) for kind in windows}
    places = torch.zeros(len(lengths), size, dtype=torch.long)
    is_copy = torch.zeros(len(lengths), most, dtype=torch.bool)
    for row, (content, length, found) in enumerate(zip(contents, lengths, spans, strict=True)):
        kept = torch.cat([torch.arange(length), longest + torch.arange(len(found))])  # this row's places in the batch
        for kind, window in windows.items():
            one = pass_mask(content, 0, length, found, sliding_window=window, is_read=is_read)
            masks[kind][row, kept[:, None], kept[None]] = one[:, 1:]  # nobody reads slot 0: the first copy is newer
        places[row, kept] = torch.tensor(pass_places(0, length, len(content), found, moves=moves))
        is_copy[row, : len(found)] = True
    return masks, places, is_copy


def collate_signal(examples: Sequence[Example], settings: Signal, windows: Mapping[str, int | None]) -> SignalBatch:
    """Return masks, positions and labels of a batch whose tokens are padded at the end.

    Args:
        examples: what is in the batch.
        settings: whether `[CLS]` is read, and which positions it takes.
        windows: the model's sliding windows, by kind of layer.
    """
    masks, places, is_copy = padded_masks(
        [example.content for example in examples],
        [len(example.ids) for example in examples],
        [example.spans for example in examples],
        windows=windows,
        is_read=settings.is_read,
        moves=settings.moves,
    )

    def labels(found: Sequence[int | None]) -> Tensor:
        return torch.tensor([-1 if label is None else label for label in found])

    return SignalBatch(
        masks,
        places,
        is_copy,
        labels([example.request_label for example in examples]),
        labels([example.response_label for example in examples]),
        torch.stack([labels([*e.span_labels, *[None] * (is_copy.shape[1] - len(e.span_labels))]) for e in examples]),
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


def turn_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of every response that turns, (B,): the mean over its labelled assessments; 0 without any.

    Args:
        logits: response logits of all copies, (B, K).
        labels: 0, 1 or -1 of each, (B, K).
    """
    is_known = labels >= 0
    is_known[:, 0] = False  # the first copy has read no response
    found = bce(logits, labels.clamp(min=0).float(), reduction="none") * is_known
    return found.sum(dim=1) / is_known.sum(dim=1).clamp(min=1)


def joint_loss(sft: Tensor, request: Tensor, response: Tensor, settings: Signal, num_rows: int) -> Tensor:
    """Return L = L_sft + lambda_2 L_cls + lambda_3 L_response of a batch, a sum like L_sft, ().

    Source: Li & Kim 2025 (arXiv 2505.17072), L_alignment = L_sft + lambda_2 L_cls. Deviations: the third term, of which
    the source has nothing; and no term of the token head, which is trained afterwards on states of the finished weights
    (docs/adr/0002), so that hours of fine-tuning need not be made again for another head.

    Args:
        sft: the weighted sum over the learned tokens, ().
        request: L_cls of every row, (B,).
        response: the loss of the response of every row, (B,).
        settings: of both lambdas.
        num_rows: of the step that the batch is a part of; both losses are means over it.
    """
    return sft + (settings.request_weight * request + settings.response_weight * response).sum() / num_rows


class SignalModel(nn.Module):
    """A language model with its `[CLS]` signal; its state holds what is trained and nothing else.

    Args:
        model: the language model, perhaps with an adapter.
        signal: embedding and head.
        reads_common_once: read the tokens that all rows of a pass begin with once, as `common_start.py` does.
    """

    def __init__(self, model: nn.Module, signal: ClsSignal, reads_common_once: bool = False) -> None:
        super().__init__()
        self.model = model
        self.signal = signal
        self.reads_common_once = reads_common_once

    def __getattr__(self, name: str) -> Any:
        """Return what the trainer asks of a language model, such as how to save memory, from the language model."""
        if "checkpointing" in name:
            return getattr(self.model, name)
        return super().__getattr__(name)

    def forward(self, input_ids: Tensor, masks: Masks, places: Tensor, is_learned: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits that the learned tokens are drawn from (N, V) and the logits of the copies (B, K, 2).

        Args:
            input_ids: tokens, (B, T).
            masks: true where a row may read, (B, T + K, T + K), by kind of layer.
            places: position of every row, (B, T + K).
            is_learned: which tokens are learned, (B, T).
        """
        language_model: Any = self.model
        tokens = language_model.get_input_embeddings()(input_ids)  # (B, T, D)
        longest = input_ids.shape[1]
        copies = self.signal.embedding.to(tokens).expand(len(input_ids), places.shape[1] - longest, -1)
        rows = torch.cat([tokens, copies], dim=1)  # (B, T + K, D)

        def run(which: slice, tokens: slice, **cached: Any) -> Any:
            some = {kind: mask[which, tokens, : tokens.stop] for kind, mask in masks.items()}
            with predicting(language_model, is_learned[which, tokens]):
                return forward(language_model, rows[which, tokens], some, places[which, tokens], **cached)

        common = num_common(input_ids, is_learned, masks) if self.reads_common_once else 0
        output = read_once(language_model, run, len(rows), common)
        return output.logits, self.signal(output.hidden_states[-1][:, longest - common :])

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
    """Return an untrained signal for a model: an embedding as long as a word's, and a small head.

    An embedding that stays as it is has to read well from the start: that of the first end-of-sequence token does,
    which in most chat templates ends a turn.
    """
    table: Any = model.get_input_embeddings()
    embeddings: Tensor = table.weight.detach()
    with torch.random.fork_rng():
        set_seed(seed)  # layers draw from the global generator
        signal = ClsSignal(embeddings.shape[1], settings.hidden)
        nn.init.normal_(signal.embedding, std=float(embeddings.float().std()))
    if not settings.is_embedding_trained:
        signal.embedding.data = embeddings[_first_eos(model)].float().clone()
    return signal.to(embeddings.device)


def _first_eos(model: PreTrainedModel) -> int:
    """Return the first end-of-sequence token of the model; 0 where it names none."""
    found = model.generation_config.eos_token_id if model.generation_config is not None else None
    return next(iter(found), 0) if isinstance(found, list) else found or 0
