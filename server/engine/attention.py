"""Attention over keys and values that lie in slots, for any model that takes a registered attention function.

A row, a token or a copy of `[CLS]`, reads the slots that it is told to read: sliding windows, `[CLS]`, its spans and
shared prompts are all the same to it. Few rows are read by lists of slots, many rows of one sequence by a mask.
"""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, count
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from server.engine.compiled import operation
from server.engine.native import attend_of, keep_of
from server.engine.tape import dense

_ATTENTIONS: "WeakValueDictionary[int, SlotAttention]" = WeakValueDictionary()
"""By number: registered functions and compiled code are for ever, and must not keep a cache alive."""
_NUMBERS = count()
_PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


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
        num_slots: how many tokens there is room for. One more slot is nobody's.

    Raises:
        ValueError: if the model's attention cannot be set.
    """

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self._layers: dict[int, Any] = {}
        self._new = torch.empty(0, dtype=torch.long)
        self._reads: Mapping[int | None, Reads] = {}
        self._dtype = model.dtype
        self._native = attend_of(model.dtype, model.device)
        self._keep = keep_of(model.device)
        self.number = next(_NUMBERS)
        _ATTENTIONS[self.number] = self
        name = f"ballast_slots_{self.number}"
        AttentionInterface.register(name, partial(_attention_of_layer, self.number))
        model.set_attn_implementation(name)
        if model.config.get_text_config()._attn_implementation != name:
            raise ValueError(f"the attention of {type(model).__name__} cannot be set")

    @property
    def num_layers(self) -> int:
        """Layers that have read from here."""
        return len(self._layers)

    @property
    def bytes_per_slot(self) -> int:
        """What the keys and values of one token take, known after the first pass."""
        stores = [store for layer in self._layers.values() for store in layer.ballast_slots]
        return sum(store[:, 0].numel() * store.element_size() for store in stores)

    def resize(self, num_slots: int) -> None:
        """Forget all keys and values, and make room for this many tokens."""
        self.num_slots = num_slots
        for layer in self._layers.values():
            layer.ballast_slots = tuple(
                _zeros(store, (len(store), num_slots + 1, store.shape[2])) for store in layer.ballast_slots
            )

    def prepare(self, new: Tensor, reads: Mapping[int | None, Reads]) -> None:
        """Say where the rows of the next pass are kept, (R,), and what they read, by sliding window."""
        self._new, self._reads = new, reads

    def join(self, layer: Any, key: Tensor, value: Tensor) -> None:
        """Give a layer stores for keys and values like these, (1, H', R, D). It keeps them as `ballast_slots`."""
        self._layers[int(layer.layer_idx)] = layer
        layer.ballast_slots = tuple(
            _zeros(some, (some.shape[1], self.num_slots + 1, some.shape[3])) for some in (key, value)
        )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        sliding_window: int | None,
        scaling: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Keep the new keys and values, (1, H', R, D), in stores (H', slots, D), and return what is read, (1, R, H, D).

        Args:
            query: of all rows, (1, H, R, D).
            key: of all rows.
            value: of all rows.
            keys: the store.
            values: the store.
            sliding_window: of the layer.
            scaling: of the scores; None takes 1 / sqrt(D).
            softcap: the most that a score may be; None for no cap.
        """
        if self._keep is not None and key.dtype == value.dtype == keys.dtype:
            self._keep(key[0], value[0], keys, values, self._new)
        else:
            keys.index_copy_(1, self._new, key[0])
            values.index_copy_(1, self._new, value[0])
        reads = self._reads[sliding_window]
        queries = query[0].transpose(0, 1)  # (R, H, D)
        output = queries.new_empty(*queries.shape[:2], values.shape[-1])
        is_plain = softcap is None and queries.dtype == keys.dtype == values.dtype == self._dtype
        if len(reads.rows) and self._native is not None and is_plain:
            scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
            queries = dense(queries, last=True)
            self._native(queries, keys, values, output, reads.rows, reads.slots, reads.offsets, scale)
        elif len(reads.rows):
            slots, mask = reads.padded
            few = _by_key_head(queries[reads.rows], keys)  # (N, H', G, D)
            k, v = (store[:, slots].transpose(0, 1) for store in (keys, values))  # (N, H', S, D)
            found = _attention(few, k, v, mask[:, None, None], scaling, softcap)
            output[reads.rows] = found.flatten(1, 2)
        for first, slots, mask in reads.blocks:
            many = _by_key_head(queries[first : first + len(mask)], keys)  # (N, H', G, D)
            num_groups = many.shape[2]
            # All queries of one key head side by side: keys are read once.
            packed = many.permute(1, 2, 0, 3).flatten(1, 2)[None]  # (1, H', G * N, D)
            k, v = (store[None, :, slots] for store in (keys, values))  # (1, H', S, D)
            found = _attention(packed, k, v, mask.repeat(num_groups, 1)[None, None], scaling, softcap)[0]
            found = found.view(len(found), num_groups, len(mask), -1).permute(2, 0, 1, 3)  # (N, H', G, D)
            output[first : first + len(mask)] = found.flatten(1, 2)
        return output[None]


def _zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros; on a CPU they take memory only as far as they are written, which those of torch do not."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, prod(shape) * like.element_size(), **_PRIVATE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _attention_of_layer(
    number: int, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **more: Any
) -> tuple[Tensor, None]:
    """Attend for a layer: what transformers calls, and what a compiler sees."""
    if more.get("s_aux") is not None:
        raise ValueError("attention sinks are not supported")
    if getattr(module, "ballast_number", None) != number:
        module.ballast_number = number
        _ATTENTIONS[number].join(module, key, value)
    settings = more.get("sliding_window"), more.get("scaling"), more.get("softcap")
    return torch.ops.ballast.attend(query, key, value, *module.ballast_slots, number, *settings), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    number: int,
    *settings: Any,
) -> Tensor:
    return _ATTENTIONS[number].attend(query, key, value, keys, values, *settings)


def _shape(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *settings: Any) -> Tensor:
    """Return something of the shape of what is read, for the compiler."""
    return query.new_empty(1, query.shape[2], query.shape[1], values.shape[2])


# What is read changes with every pass.
operation(
    "attend(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, int number, "
    "int? sliding_window, float? scaling, float? softcap) -> Tensor",
    _attend,
    _shape,
    "CompositeExplicitAutograd",
)


def _by_key_head(queries: Tensor, keys: Tensor) -> Tensor:
    """Return queries (N, H, D) beside those that share a key head, (N, H', G, D)."""
    return queries.view(len(queries), len(keys), -1, queries.shape[-1])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """Return attention (B, H', N, D) over keys (B, H', S, D), where a mask (B, 1, 1 or N, S) is true."""
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value
