"""The `[CLS]` signal: one learned embedding outside the causal order, and the head that reads its final state.

Source: Li & Kim 2025 (arXiv 2505.17072). `[CLS]` stands in slot 0 of the cache. Request tokens never read it, so
their keys and values are those of the plain model; response tokens read the newest value. A re-assessment is one
more row of the pass that feeds the newest token, and its keys and values replace those in slot 0. Deviations: two
logits instead of one, for request and response; the language model's vocabulary does not grow, because the
embedding is the signal's own.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from model import adapter, tensors
from model.attention import Span, pass_mask, pass_places
from model.cache_keyword import with_cache
from model.config import ClsConfig
from model.errors import CheckpointError, ModelError

FILE = "cls_signal.safetensors"
OUTPUTS = ("request", "response")
"""What the logits of the head are, in order."""


class ClsSignal(nn.Module):
    """The embedding of `[CLS]` and its head, in float32.

    Args:
        width: width of the model's hidden states (D).
        hidden: width of the head's hidden layer; 0 is a linear head, as published.
    """

    def __init__(self, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(width))
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.out = nn.Linear(hidden or width, len(OUTPUTS))

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (N, 2) of the final states of `[CLS]`, (N, D) in any precision."""
        with torch.autocast(states.device.type, enabled=False):
            x = states.float()
            if self.hidden is not None:
                x = nn.functional.gelu(self.hidden(x))
            logits: Tensor = self.out(x)
        return logits


FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of layers, as transformers names them."""
Masks = dict[str, Tensor]
"""Masks by kind of layer: those with a sliding window need another than those without."""


class ClsCache(DynamicCache):
    """The keys and values of one sequence with `[CLS]` in slot 0.

    It is built without the model's configuration, because sliding-window layers of a configured cache forget tokens,
    and slot 0 with them.

    Args:
        content: for every request token, whether it is the client's text.
    """

    def __init__(self, content: Sequence[bool]) -> None:
        super().__init__()
        self.content = tuple(content)

    @property
    def length(self) -> int:
        """Tokens that were fed, `[CLS]` not included."""
        return max(0, self.get_seq_length() - 1)

    def shorten(self, length: int) -> None:
        """Forget the tokens after the first `length`.

        `[CLS]` stays as it is, and may come from the forgotten tokens: the next pass must assess.
        """
        if (surplus := self.length - length) > 0:
            self.crop(-surplus)

    def fold(self, num_copies: int) -> None:
        """Move the newest of the copies at the end into slot 0, and forget them."""
        layers: list[Any] = self.layers  # typed as any kind of cache there
        for layer in layers:
            layer.keys[:, :, 0], layer.values[:, :, 0] = layer.keys[:, :, -1], layer.values[:, :, -1]
        self.crop(-num_copies)


class ClsPass(NamedTuple):
    """What one cached pass over T tokens gives."""

    logits: Tensor
    """Next-token logits of the newest row that is a token, (V,); of a copy where there was no token."""
    hidden_states: tuple[Tensor, ...]
    """Of every layer at the new tokens, (T, D) each."""
    copies: Tensor
    """Final states of `[CLS]`, one for each span, (K, D)."""


def feed(
    model: PreTrainedModel,
    signal: ClsSignal,
    cache: ClsCache,
    token_ids: Sequence[int],
    spans: Sequence[Span] = (),
    *,
    is_read: bool = True,
    moves: bool = True,
) -> ClsPass:
    """Feed new tokens of one sequence and assess it, in one forward pass.

    Args:
        model: any causal LM that takes 4-D attention masks.
        signal: brings the embedding, in the space of what the model's embedding layer gives.
        cache: extended in place.
        token_ids: the T new tokens; none where the pass only assesses.
        spans: the K assessments, as `model.attention.pass_mask` takes them.
        is_read: response tokens read `[CLS]` (strategic attention); off is the published ablation.
        moves: `[CLS]` takes the position of the newest token that it covers, instead of position 0.
    """
    first, num_tokens = cache.length, len(token_ids)
    stop, num_request = first + num_tokens, len(cache.content)
    windows = sliding_windows(model)
    places = pass_places(first, stop, num_request, spans, moves=moves)
    rows = embed(model, token_ids)  # (T, D)
    is_empty = cache.get_seq_length() == 0
    masks: Masks = {}
    if is_empty or spans or num_tokens > 1 or any(windows.values()) or not is_read or first < num_request:
        for kind, window in windows.items():
            mask = pass_mask(cache.content, first, stop, spans, sliding_window=window, is_read=is_read)
            if is_empty:  # one more row: slot 0, which holds something before it is read
                mask = torch.cat([torch.eye(1, mask.shape[1], dtype=torch.bool), mask])
            masks[kind] = mask[None]
        copies = signal.embedding.to(rows).expand(len(spans) + is_empty, -1)
        rows = torch.cat([copies[:is_empty], rows, copies[is_empty:]])
        places = [0] * is_empty + places
    newest = is_empty + max(0, num_tokens - 1)
    output = forward(
        model,
        rows[None],
        masks,
        torch.tensor([places]),
        logits_to_keep=torch.tensor([newest], device=model.device),
        **with_cache(model, cache),
    )
    if spans:
        cache.fold(len(spans))
    states = tuple(state[0, is_empty : is_empty + num_tokens] for state in output.hidden_states)
    return ClsPass(output.logits[0, -1], states, output.hidden_states[-1][0, is_empty + num_tokens :])


def forward(model: PreTrainedModel, embeddings: Tensor, masks: Masks, places: Tensor, **more: Any) -> Any:
    """Run the model over sequences of embeddings with masks of our own, and return its output.

    Args:
        model: any causal LM that takes 4-D attention masks.
        embeddings: (B, T, D).
        masks: true where a row may read a slot, (B, T, S), by kind of layer; none where the only row reads all slots.
        places: position of every row, (B, T).
        more: further arguments of the model.
    """
    dtype = model.dtype
    if masks:
        # Additive floats: every attention implementation takes them.
        added = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=model.device).masked_fill(
                ~mask.to(model.device), torch.finfo(dtype).min
            )[:, None]
            for kind, mask in masks.items()
        }
        more["attention_mask"] = added if len(added) > 1 else next(iter(added.values()))
    return model(
        inputs_embeds=embeddings.to(model.device, dtype),
        position_ids=places.to(model.device),
        output_hidden_states=True,
        **more,
    )


def embed(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Return the embeddings of some tokens as the model's first layer reads them, (T, D)."""
    ids = torch.tensor(token_ids, dtype=torch.long, device=model.device)
    embedded: Tensor = model.get_input_embeddings()(ids)
    return embedded


def sliding_windows(model: PreTrainedModel) -> dict[str, int | None]:
    """Return how many tokens a token reads, by kind of layer; None for all of them.

    Raises:
        ModelError: if some layers are of a kind that no mask describes.
    """
    config = model.config.get_text_config()
    named = sorted(set(getattr(config, "layer_types", None) or ()))
    if unknown := set(named) - {FULL, SLIDING}:
        raise ModelError(f"[CLS] cannot be read by a model with layers of {sorted(unknown)}")
    window: int | None = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return {FULL: None}
    kinds = named or [SLIDING]
    return {kind: window if kind == SLIDING else None for kind in kinds}


def check(signal: ClsSignal, model: PreTrainedModel) -> None:
    """Refuse a signal that does not fit the model.

    Raises:
        CheckpointError: if its embedding is not as wide as the model's.
        ModelError: as `sliding_windows`.
    """
    width = int(model.config.get_text_config().hidden_size)
    if len(signal.embedding) != width:
        raise CheckpointError(f"the embedding of [CLS] is {len(signal.embedding)} wide, the model's are {width}")
    sliding_windows(model)


def save(signal: ClsSignal, folder: Path, config: ClsConfig) -> None:
    """Write embedding and head to `folder`, in float32, with how they are to be read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors.write(signal, folder / FILE, {"config": json.dumps(asdict(config))})


def beside(adapter_folder: Path) -> Path | None:
    """Return the folder of the signal that belongs to an adapter; None if it has none.

    That is the adapter's own, or the checkpoint that it lies in.
    """
    places = (adapter_folder, *((adapter_folder.parent,) if adapter_folder.name == adapter.FOLDER else ()))
    return next((place for place in places if (place / FILE).is_file()), None)


def load(folder: Path) -> tuple[ClsSignal, ClsConfig]:
    """Return the signal that `save` wrote, and how it is to be read; the shapes say how wide it is.

    Raises:
        CheckpointError: if the file is missing, truncated, or holds something else.
    """
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            config = json.loads((file.metadata() or {})["config"])
        hidden = len(found["hidden.weight"]) if "hidden.weight" in found else 0
        signal = ClsSignal(len(found["embedding"]), hidden)
        signal.load_state_dict(found)
        return signal.eval(), ClsConfig(**config | {"windows": tuple(config["windows"])})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the [CLS] signal {folder / FILE}: {error}") from error
