"""Attention over keys and values that lie in slots, for any model that takes a registered attention function.

A row, a token or a copy of `[CLS]`, reads the slots that it is told to read: sliding windows, `[CLS]`, its spans and
shared prompts are all the same to it. Few rows are read by lists of slots, many rows of one sequence by a mask.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from server.engine.native import attend_of


class Block(NamedTuple):
    """Some rows, one after the other, that read the same slots through a mask."""

    first: int
    """The first of the N rows."""
    slots: Tensor
    """(S,)."""
    mask: Tensor
    """True where a row reads a slot, (N, S)."""


@dataclass(frozen=True)
class Reads:
    """What the rows of a pass read."""

    rows: Tensor
    """Rows that read by list, (N,)."""
    slots: Tensor
    """What they read, one list after the other."""
    offsets: Tensor
    """Where each list begins, and the end of the last one, (N + 1,)."""
    blocks: Sequence[Block]
    """All other rows."""

    @classmethod
    def of(cls, lists: Mapping[int, Tensor], blocks: Sequence[Block], device: torch.device) -> "Reads":
        """Return what rows read, by number and list of slots, and in blocks."""
        rows = torch.tensor(list(lists), dtype=torch.long)
        slots = torch.cat([*lists.values(), torch.empty(0, dtype=torch.long)])
        offsets = torch.tensor([0, *accumulate(map(len, lists.values()))])
        moved = [Block(first, slots.to(device), mask.to(device)) for first, slots, mask in blocks]
        return cls(rows.to(device), slots.to(device), offsets.to(device), moved)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """The lists side by side, and false at the padding, (N, S) each."""
        lengths = self.offsets.diff()
        place = torch.arange(int(lengths.max()), device=lengths.device)
        mask = place < lengths[:, None]
        return self.slots[(self.offsets[:-1, None] + place).clamp(max=len(self.slots) - 1)], mask


class SlotAttention:
    """The attention of one model, and the slots that its keys and values lie in.

    Args:
        model: any causal LM whose attention can be set; it is changed to read from slots alone.
        num_slots: how many tokens there is room for.

    Raises:
        ValueError: if the model's attention cannot be set.
    """

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self._stores: dict[int, tuple[Tensor, Tensor]] = {}
        self._new = torch.empty(0, dtype=torch.long)
        self._reads: Mapping[int | None, Reads] = {}
        self._dtype = model.dtype
        self._native = attend_of(model.dtype) if model.device.type == "cpu" else None
        self.layers: set[int] = set()
        """That called."""
        name = f"ballast_slots_{id(self)}"
        # Registered for ever: it must not keep the cache alive.
        AttentionInterface.register(name, partial(SlotAttention._attend, weakref.proxy(self)))
        model.set_attn_implementation(name)
        if model.config.get_text_config()._attn_implementation != name:
            raise ValueError(f"the attention of {type(model).__name__} cannot be set")

    @property
    def bytes_per_slot(self) -> int:
        """What the keys and values of one token take, known after the first pass."""
        stores = [store for pair in self._stores.values() for store in pair]
        return sum(store[:, 0].numel() * store.element_size() for store in stores)

    def resize(self, num_slots: int) -> None:
        """Forget all keys and values, and make room for this many tokens."""
        self.num_slots, self._stores = num_slots, {}

    def prepare(self, new: Tensor, reads: Mapping[int | None, Reads]) -> None:
        """Say where the rows of the next pass are kept, (R,), and what they read, by sliding window."""
        self._new, self._reads = new, reads

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
    ) -> tuple[Tensor, None]:
        """Keep the new keys and values, (1, H', R, D), and return what the queries read, (1, R, H, D)."""
        layer = int(module.layer_idx)
        self.layers.add(layer)
        if layer not in self._stores:
            self._stores[layer] = (self._room(key), self._room(value))
        keys, values = self._stores[layer]
        keys.index_copy_(1, self._new, key[0])
        values.index_copy_(1, self._new, value[0])
        reads = self._reads[more.get("sliding_window")]
        queries = query[0].transpose(0, 1)  # (R, H, D)
        output = queries.new_empty(*queries.shape[:2], values.shape[-1])
        settings = (more.get("scaling"), more.get("softcap"), more.get("s_aux"))
        is_plain = settings[1:] == (None, None) and queries.dtype == keys.dtype == values.dtype == self._dtype
        if len(reads.rows) and self._native is not None and is_plain:
            scaling = queries.shape[-1] ** -0.5 if settings[0] is None else settings[0]
            queries = queries.contiguous()
            self._native(queries, keys, values, output, reads.rows, reads.slots, reads.offsets, scaling)
        elif len(reads.rows):
            slots, mask = reads.padded
            few = _by_key_head(queries[reads.rows], keys)  # (N, H', G, D)
            k, v = (store[:, slots].transpose(0, 1) for store in (keys, values))  # (N, H', S, D)
            found = _attention(few, k, v, mask[:, None, None], *settings)
            output[reads.rows] = found.flatten(1, 2)
        for first, slots, mask in reads.blocks:
            many = _by_key_head(queries[first : first + len(mask)], keys)  # (N, H', G, D)
            num_groups = many.shape[2]
            # All queries of one key head side by side: keys are read once.
            packed = many.permute(1, 2, 0, 3).flatten(1, 2)[None]  # (1, H', G * N, D)
            k, v = (store[None, :, slots] for store in (keys, values))  # (1, H', S, D)
            found = _attention(packed, k, v, mask.repeat(num_groups, 1)[None, None], *settings)[0]
            found = found.view(len(found), num_groups, len(mask), -1).permute(2, 0, 1, 3)  # (N, H', G, D)
            output[first : first + len(mask)] = found.flatten(1, 2)
        return output[None], None

    def _room(self, some: Tensor) -> Tensor:
        """Return the store of keys or values like `some`, (H', slots, D)."""
        return some.new_zeros(some.shape[1], self.num_slots, some.shape[3])


def _by_key_head(queries: Tensor, keys: Tensor) -> Tensor:
    """Return queries (N, H, D) beside those that share a key head, (N, H', G, D)."""
    return queries.view(len(queries), len(keys), -1, queries.shape[-1])


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return attention as the model wants it: (B, H', N, D) over (B, H', S, D) where a mask (B, 1, 1 or N, S) is true.

    Args:
        query: queries.
        key: keys.
        value: values.
        mask: true where a query reads a key.
        scaling: of the scores; None takes 1 / sqrt(D).
        softcap: the most that a score may be (Gemma 2); None for no cap.
        sinks: a score of each query head that takes its share and gives nothing (gpt-oss), not supported.

    Raises:
        ValueError: if the model has sinks.
    """
    if sinks is not None:
        raise ValueError("attention sinks are not supported")
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value
