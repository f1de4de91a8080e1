"""The `[CLS]` signal: one learned embedding outside the causal order, and the head that reads its final state.

Source: Li & Kim 2025 (arXiv 2505.17072). `[CLS]` stands in slot 0 of the cache. Request tokens never read it, so
their keys and values are those of the plain model; response tokens read the newest value. A re-assessment is one
more row of the pass that feeds the newest token, and its keys and values replace those in slot 0. Deviations: two
logits instead of one, for request and response; the language model's vocabulary does not grow, because the
embedding is the signal's own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from model.attention import assessment_mask, token_mask, training_mask, training_places
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


class ClsPass(NamedTuple):
    """What one cached pass gives."""

    logits: Tensor
    """Next-token logits of the newest token, (V,)."""
    state: Tensor | None
    """Final state of `[CLS]`, (D,); None if the pass made no assessment."""


class ClsCache:
    """The keys and values of one sequence with `[CLS]` in slot 0, and the passes that extend them.

    Args:
        model: any causal LM that takes 4-D attention masks.
        signal: brings the embedding, in the space of the model's scaled embeddings.
        content: for every request token, whether it is the client's text.
        is_read: response tokens read `[CLS]` (strategic attention); off is the published ablation.
        moves: `[CLS]` takes the position of the newest token that it was assessed with, instead of position 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        signal: ClsSignal,
        content: Sequence[bool],
        *,
        is_read: bool = True,
        moves: bool = True,
    ) -> None:
        self._model = model
        self._signal = signal
        self._content = content
        self._is_read = is_read
        self._moves = moves
        self._cache = DynamicCache()  # without the configuration: its sliding layers would drop slot 0
        self.length = 0
        """Tokens that were fed, `[CLS]` not included."""
        self._run(signal.embedding[None], torch.ones(1, 1, dtype=torch.bool), [0])  # slot 0; replaced before it is read

    def feed(self, token_ids: Sequence[int], read: range | None = None) -> ClsPass:
        """Feed new tokens and, with `read`, assess once behind them.

        The newest token of the pass reads the new value of `[CLS]`, if it is a response token; earlier tokens of
        the pass read the old one.

        Args:
            token_ids: the T new tokens, at least one.
            read: the response tokens that the assessment reads, as `model.attention.window` gives them.
        """
        first, stop = self.length, self.length + len(token_ids)
        tokens = embed(self._model, token_ids)  # (T, D)
        mask = token_mask(first, stop, len(self._content), sliding_window=sliding_window(self._model))  # (T, 1 + stop)
        mask[:, 0] &= self._is_read
        places = list(range(first, stop))
        self.length = stop
        if read is None:
            return ClsPass(self._run(tokens, mask, places).logits[0, -1], None)
        cls = self._signal.embedding[None].to(tokens)
        output = self._run(
            torch.cat([tokens, cls]),
            self._with_assessment(mask, read),
            [*places, stop - 1 if self._moves else 0],
        )
        self._fold()
        return ClsPass(output.logits[0, -2], output.hidden_states[-1][0, -1])

    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`. `[CLS]` stays as it is until it is assessed again.

        Its value may come from the forgotten tokens, so the next pass must assess.
        """
        if (surplus := self.length - length) > 0:
            self._cache.crop(-surplus)
            self.length = length

    def _with_assessment(self, mask: Tensor, read: range) -> Tensor:
        """Return the mask with a column and a row for the new `[CLS]` behind the tokens, (T + 1, S + 1)."""
        new_column = torch.zeros(len(mask), 1, dtype=torch.bool)
        new_column[-1] = mask[-1, 0]
        mask[-1, 0] = False  # the newest token reads the new value instead of the old
        row = torch.zeros(1, mask.shape[1] + 1, dtype=torch.bool)
        slots = assessment_mask(self._content, read)  # (S',): slot 0 is `[CLS]` itself
        row[0, 1 : len(slots)] = slots[1:]
        row[0, -1] = True
        return torch.cat([torch.cat([mask, new_column], dim=1), row])

    def _fold(self) -> None:
        """Move the newest keys and values, those of the new `[CLS]`, into slot 0."""
        layers: list[Any] = self._cache.layers  # typed as any kind of cache there
        for layer in layers:
            layer.keys[:, :, 0], layer.values[:, :, 0] = layer.keys[:, :, -1], layer.values[:, :, -1]
        self._cache.crop(-1)

    def _run(self, embeddings: Tensor, mask: Tensor, places: list[int]) -> Any:
        cache = {"past_key_values": self._cache, "use_cache": True}
        return forward(self._model, embeddings[None], mask[None], torch.tensor([places]), **cache)


def forward(model: PreTrainedModel, embeddings: Tensor, mask: Tensor, places: Tensor, **cache: Any) -> Any:
    """Run the model over sequences of embeddings with masks of our own, and return its output.

    Args:
        model: any causal LM that takes 4-D attention masks.
        embeddings: (B, T, D).
        mask: true where a row may read a slot, (B, T, S).
        places: position of every row, (B, T).
        cache: keyword arguments about the cache.
    """
    dtype: torch.dtype = next(model.parameters()).dtype
    # Additive floats: every attention implementation takes them.
    allowed = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return model(
        inputs_embeds=embeddings.to(model.device, dtype),
        attention_mask=allowed[:, None].to(model.device),
        position_ids=places.to(model.device),
        output_hidden_states=True,
        **cache,
    )


def forward_training(
    model: PreTrainedModel,
    signal: ClsSignal,
    token_ids: Sequence[int],
    content: Sequence[bool],
    assessments: Sequence[tuple[int, range]],
    *,
    is_read: bool = True,
    moves: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return next-token logits (n, V) of all n tokens, and the final states (K, D) of K copies of `[CLS]`.

    One pass over a sequence that holds a copy per assessment; it equals cached decoding position by position.

    Args:
        model: any causal LM that takes 4-D attention masks.
        signal: brings the embedding.
        token_ids: request and response.
        content: for every request token, whether it is the client's text.
        assessments: how many response tokens each copy covers, and which of them it reads.
        is_read: response tokens read `[CLS]`.
        moves: each copy takes the position of the newest token that it covers, instead of position 0.
    """
    num_copies, num_request = len(assessments), len(content)
    num_response = len(token_ids) - num_request
    mask = training_mask(content, num_response, assessments, sliding_window=sliding_window(model), is_read=is_read)
    places = torch.tensor([training_places(num_request, num_response, assessments, moves=moves)])
    tokens = embed(model, token_ids)
    copies = signal.embedding.to(tokens).expand(num_copies, -1)
    output = forward(model, torch.cat([copies, tokens])[None], mask[None], places, use_cache=False)
    return output.logits[0, num_copies:], output.hidden_states[-1][0, :num_copies]


def embed(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Return the embeddings of some tokens as the model's first layer reads them, (T, D)."""
    embedded: Tensor = model.get_input_embeddings()(torch.tensor(token_ids, device=model.device))
    return embedded


def sliding_window(model: PreTrainedModel) -> int | None:
    """Return how many tokens a token reads in the model's sliding-window layers; None if it has none.

    Raises:
        ModelError: if some layers have a window and others none: one mask cannot serve both yet.
    """
    config = model.config.get_text_config()
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is None or kinds == {"full_attention"}:
        return None
    if len(kinds) > 1:
        raise ModelError(f"[CLS] cannot be read yet by a model whose layers mix {sorted(kinds)}")
    return window


def save(signal: ClsSignal, folder: Path) -> None:
    """Write embedding and head to `folder`, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in signal.state_dict().items()}
    save_file(tensors, folder / FILE)
    (folder / FILE).chmod(0o644)  # safetensors makes files that only their owner may read


def load(folder: Path) -> ClsSignal:
    """Return the signal that `save` wrote; the shapes say how wide it is.

    Raises:
        CheckpointError: if the file is missing, truncated, or holds something else.
    """
    try:
        tensors = load_file(folder / FILE)
        hidden = len(tensors["hidden.weight"]) if "hidden.weight" in tensors else 0
        signal = ClsSignal(len(tensors["embedding"]), hidden)
        signal.load_state_dict(tensors)
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read the [CLS] signal {folder / FILE}: {error}") from error
    return signal.eval()
