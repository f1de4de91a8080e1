"""What all rows of a batch begin with, such as the chat template's own text, is read once for all of them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from model.cache_keyword import NAMES, base_of, with_cache

EVERYTHING = slice(None)


def can_share(model: Any) -> bool:
    """Tell whether all that a model's layers keep of the tokens before are keys and values, one for each token."""
    base = base_of(model)
    if not NAMES & inspect.signature(base.forward).parameters.keys():
        return False
    kept = DynamicCache(config=base.config).layers
    return bool(kept) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in kept)


def num_common(ids: Tensor, is_learned: Tensor, masks: Mapping[str, Tensor]) -> int:
    """Return with how many tokens all rows begin, before any reads `[CLS]` or gives the logits of a learned one.

    At least one token of each row is left over. A single row has nothing in common with others: 0.

    Args:
        ids: padded at the end, (B, T).
        is_learned: (B, T).
        masks: of T tokens and K copies of `[CLS]`, (B, T + K, T + K) by kind of layer; empty without copies.
    """
    length = ids.shape[1]
    differs = (ids != ids[0]).any(dim=0)  # (T,)
    for mask in masks.values():
        of_tokens = mask[:, :length]
        differs |= (of_tokens != of_tokens[0]).any(dim=2).any(dim=0) | of_tokens[:, :, length:].any(dim=2).any(dim=0)
    differs[:-1] |= is_learned[:, 1:].any(dim=0)
    differs[-1] = True
    return int(differs.int().argmax()) if len(ids) > 1 else 0


def read_once(model: Any, run: Callable[..., Any], num_rows: int, num_common: int) -> Any:
    """Return what `run` gives of all rows, after it has run the tokens that they have in common in one of them.

    Gradients flow back into the one. Not for models that are run again for their gradients: they keep nothing.

    Args:
        model: one that `can_share`, perhaps with an adapter.
        run: runs the model over two slices, of the rows and of their tokens, with further arguments.
        num_rows: B.
        num_common: tokens that all rows begin with; 0 for none.
    """
    if not num_common:
        return run(EVERYTHING, EVERYTHING, use_cache=False)
    cache = DynamicCache()  # without the model's configuration: sliding windows would forget tokens
    arguments = with_cache(model, cache)
    run(slice(1), slice(num_common), **arguments)
    layers: list[Any] = cache.layers  # typed as any kind of cache there
    for layer in layers:
        layer.keys = layer.keys.expand(num_rows, -1, -1, -1)
        layer.values = layer.values.expand(num_rows, -1, -1, -1)
    return run(EVERYTHING, slice(num_common, None), **arguments)
