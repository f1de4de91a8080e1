"""Hidden states at every token of the query, computed once with the frozen model and cached on disk.

Beside `states.py`, which keeps of a request what the heads of request and response read.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.chat import ChatTemplate
from model.checkpoint import fingerprint_weights
from model.config import TokenHeadConfig
from model.errors import TemplateError
from model.pretrained import Pretrained
from training.config import HeadRecipe
from training.errors import DataError
from training.hidden import Hidden, Placed, place
from training.progress import tracked
from training.shards import digest, write_atomically
from training.states import SHARD_ROWS, batches, check, half, states_of


class QueryStates(NamedTuple):
    """What the head reads of one message."""

    states: Tensor
    """At every token of the query, (T, S) in float16."""
    inside: Tensor
    """Which of them are the request's, (T,) bools."""


def read(
    recipe: HeadRecipe, pretrained: Pretrained, config: TokenHeadConfig, hidden: Sequence[Hidden]
) -> list[QueryStates]:
    """Return the states of messages, as far as `recipe.cut` lets them be.

    Raises:
        DataError: if the chat template refuses one.
        RecipeError: if the model has no such layer, or its context cannot hold the cut.
    """
    check(pretrained, config.layers, recipe.cut)
    template = ChatTemplate(pretrained.tokenizer, marks_content=True)
    try:
        placed = [place(one, pretrained.tokenizer, template, recipe.cut) for one in hidden]
    except TemplateError as error:
        raise DataError(f"a request: {error}") from error
    return compute(pretrained, placed, config.layers, batch_tokens=recipe.batch_tokens, cache=Path(recipe.cache))


def compute(
    pretrained: Pretrained, placed: Sequence[Placed], layers: Sequence[int], *, batch_tokens: int, cache: Path
) -> list[QueryStates]:
    """Return the states of messages at `layers`, from the cache as far as they are there.

    Args:
        pretrained: the frozen model. Where a `[CLS]` is served, no token of a request reads it, so it is not needed.
        placed: the messages.
        layers: as `training.states.compute` takes them.
        batch_tokens: tokens of one forward pass, padding included.
        cache: folder of the files.
    """
    identity = [fingerprint_weights(pretrained.model), str(pretrained.model.dtype), list(layers)]
    found: list[QueryStates] = []
    for start in tracked(range(0, len(placed), SHARD_ROWS), "states of queries"):
        chunk = placed[start : start + SHARD_ROWS]
        name = digest(identity, [[one.prompt.request, one.prompt.query_start] for one in chunk])[:32]
        path = cache / "queries" / f"{name}.safetensors"
        if not path.is_file():
            states = _forward(pretrained, chunk, layers, batch_tokens)
            write_atomically(path, partial(save_file, {"states": torch.cat(states)}))
        lengths = [len(one.inside) for one in chunk]
        of_each = torch.split(load_file(path)["states"], lengths)
        found += [QueryStates(states, one.inside) for states, one in zip(of_each, chunk, strict=True)]
    return found


def _forward(
    pretrained: Pretrained, placed: Sequence[Placed], layers: Sequence[int], batch_tokens: int
) -> list[Tensor]:
    states: dict[int, Tensor] = {}
    for batch in batches([len(one.prompt.request) for one in placed], batch_tokens):
        prompts = [placed[index].prompt for index in batch]
        picked = states_of(pretrained, prompts, layers)
        for index, prompt, of_row in zip(batch, prompts, picked, strict=True):
            states[index] = half(of_row[prompt.query_start : len(prompt.request)])
    return [states[index] for index in range(len(placed))]
