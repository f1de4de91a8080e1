"""What all rows of a batch begin with, such as the chat template's own text, is read once for all of them."""

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from model.cache_keyword import with_cache


def num_shared(ids: Tensor, is_learned: Tensor, masks: Mapping[str, Tensor]) -> int:
    """Return with how many tokens all rows of a batch begin, before any reads `[CLS]` or one is learned after it.

    Args:
        ids: (B, T).
        is_learned: (B, T).
        masks: of T tokens and K copies of `[CLS]`, (B, T + K, T + K) by kind of layer; empty without copies.
    """
    length = ids.shape[1]
    differs = (ids != ids[0]).any(dim=0)  # (T,)
    for mask in masks.values():
        of_tokens = mask[:, :length]
        differs |= (of_tokens != of_tokens[0]).any(dim=2).any(dim=0) | of_tokens[:, :, length:].any(dim=2).any(dim=0)
    differs[:-1] |= is_learned[:, 1:].any(dim=0)
    differs[-1] = True  # a pass needs a token
    return int(differs.int().argmax())


def read_once(model: nn.Module, num_rows: int, read: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments with which a model goes on in `num_rows` rows after what `read` has it read in one.

    Gradients flow back into the one. A model whose layers are run again for their gradients keeps no keys and values.

    Args:
        model: a model of transformers, perhaps with an adapter.
        num_rows: how many rows go on.
        read: runs the model with further arguments.
    """
    cache = DynamicCache()  # without the model's configuration: sliding windows would forget tokens
    arguments = with_cache(model.get_base_model() if isinstance(model, PeftModel) else model, cache)
    read(**arguments)
    layers: list[Any] = cache.layers  # typed as any kind of cache there
    for layer in layers:
        layer.keys = layer.keys.expand(num_rows, -1, -1, -1)
        layer.values = layer.values.expand(num_rows, -1, -1, -1)
    return arguments
