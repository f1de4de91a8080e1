"""Hidden states of labelled rows, computed once with the frozen model and cached on disk.

Of each row it keeps what the request head reads at the last request token, and the state at every response
token, from which `RowStates.passage` makes what the response head reads. Files hold up to 512 rows of one
source and are named by what they were computed from, so a rerun, another recipe or a higher limit reuses them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.chat import ChatTemplate, EncodedPrompt, Message
from model.checkpoint import fingerprint_weights
from model.pretrained import Pretrained
from model.safety_head import Passage
from training.config import Cut
from training.errors import RecipeError
from training.progress import tracked
from training.rows import Row
from training.shards import digest, write_atomically

SHARD_ROWS = 512
"""Rows per file: an interruption loses at most this many."""
LARGEST = float(torch.finfo(torch.float16).max)
"""States are kept in half precision; the few larger values of inner layers are limited to this."""


class RowStates(NamedTuple):
    """States of one row, in float16; S is layers * D."""

    request: Tensor  # (2 * S,): the state of the last request token, and the mean over the query
    response: Tensor  # (T, S); T is 0 without a response

    def passage(self) -> Tensor:
        """Return what the response head reads at each response token, (T, 2 * S) in float32."""
        return Passage().extend(self.response) if len(self.response) else self.response.new_zeros(0, len(self.request))


class Shard(NamedTuple):
    """States of some rows in a row."""

    request: Tensor  # (N, 2 * S)
    response: Tensor  # (sum of T, S)
    ends: Tensor  # (N,): where each row's response ends in `response`


@dataclass(frozen=True)
class States:
    """States of all rows, in the order they were given."""

    shards: tuple[Shard, ...]
    places: tuple[tuple[int, int], ...]
    """Shard and row in it, of every row."""

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> RowStates:
        number, row = self.places[index]
        shard = self.shards[number]
        start = int(shard.ends[row - 1]) if row else 0
        return RowStates(shard.request[row], shard.response[start : int(shard.ends[row])])


def encode(row: Row, template: ChatTemplate, cut: Cut) -> EncodedPrompt:
    """Return a row's tokens: the newest of its request, and the first of its response as the prefill."""
    messages = row.messages
    if row.response is None:
        encoded = template.encode(messages)
    else:
        encoded = template.encode((*messages, Message("assistant", row.response)), continue_final=True)
    num_cut = max(0, len(encoded.request) - cut.request_tokens)
    return EncodedPrompt(
        encoded.request[num_cut:], encoded.prefill[: cut.response_tokens], max(0, encoded.query_start - num_cut)
    )


def compute(
    pretrained: Pretrained, rows: Sequence[Row], layers: Sequence[int], cut: Cut, *, batch_tokens: int, cache: Path
) -> States:
    """Return the states of `rows` at `layers`, from the cache as far as they are there.

    Args:
        pretrained: the frozen model.
        rows: rows of one source must stand together, or they fill more files.
        layers: 0 is the embedding, -1 the final normalised state; several are put side by side.
        cut: most tokens of a request and of a response.
        batch_tokens: tokens of one forward pass, padding included.
        cache: folder of the files.

    Raises:
        RecipeError: if the model has no such layer, or its context cannot hold the cut.
    """
    _check(pretrained, layers, cut)
    template = ChatTemplate(pretrained.tokenizer)
    encoded = [encode(row, template, cut) for row in rows]
    identity = [fingerprint_weights(pretrained.model), str(pretrained.model.dtype), list(layers), asdict(cut)]
    chunks = list(_chunks([row.group for row in rows]))
    shards = []
    for chunk in tracked(chunks, "states", unit=len):
        prompts = [encoded[index] for index in chunk]
        path = (
            cache
            / "states"
            / f"{digest(identity, [[p.request, p.prefill, p.query_start] for p in prompts])[:32]}.safetensors"
        )
        if not path.is_file():
            shard = forward(pretrained, prompts, layers, batch_tokens)
            write_atomically(path, partial(save_file, shard._asdict()))
        shards.append(Shard(**load_file(path)))
    places = tuple((number, row) for number, chunk in enumerate(chunks) for row in range(len(chunk)))
    return States(tuple(shards), places)


def forward(
    pretrained: Pretrained, prompts: Sequence[EncodedPrompt], layers: Sequence[int], batch_tokens: int
) -> Shard:
    """Return the states of some rows, running those of like length together."""
    states: dict[int, RowStates] = {}
    for batch in _batches(prompts, batch_tokens):
        states.update(zip(batch, _forward_batch(pretrained, [prompts[index] for index in batch], layers), strict=True))
    ordered = [states[index] for index in range(len(prompts))]
    return Shard(
        request=torch.stack([row.request for row in ordered]),
        response=torch.cat([row.response for row in ordered]),
        ends=torch.tensor([len(row.response) for row in ordered]).cumsum(0),
    )


@torch.inference_mode()
def _forward_batch(pretrained: Pretrained, prompts: Sequence[EncodedPrompt], layers: Sequence[int]) -> list[RowStates]:
    """Return the states of one batch, padded on the right, where causal attention never looks."""
    base = pretrained.model.base_model  # without the output head: logits are not needed
    device = pretrained.model.device
    longest = max(len(p.request) + len(p.prefill) for p in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)  # (B, T)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        tokens = torch.tensor((*prompt.request, *prompt.prefill))
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    output = base(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, output_hidden_states=True)
    picked = torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)  # (B, T, S)
    return [_row_states(picked[row], prompt) for row, prompt in enumerate(prompts)]


def _row_states(states: Tensor, prompt: EncodedPrompt) -> RowStates:
    """Return what is kept of the states (T, S) of one row and its padding."""
    num_request = len(prompt.request)
    query = Passage().extend(states[prompt.query_start : num_request])
    response = states[num_request : num_request + len(prompt.prefill)]
    return RowStates(_half(query[-1]), _half(response))


def _half(states: Tensor) -> Tensor:
    return states.clamp(-LARGEST, LARGEST).half().cpu()


def _batches(prompts: Sequence[EncodedPrompt], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices, shortest rows first, so that rows times longest row stays within `batch_tokens`."""
    lengths = [len(prompt.request) + len(prompt.prefill) for prompt in prompts]
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _chunks(groups: Sequence[str]) -> Iterator[list[int]]:
    """Yield runs of at most `SHARD_ROWS` indices of one source, in order."""
    for _, run in groupby(range(len(groups)), key=groups.__getitem__):
        indices = list(run)
        for start in range(0, len(indices), SHARD_ROWS):
            yield indices[start : start + SHARD_ROWS]


def _check(pretrained: Pretrained, layers: Sequence[int], cut: Cut) -> None:
    config = pretrained.model.config.get_text_config()
    if bad := [layer for layer in layers if not -1 <= layer <= config.num_hidden_layers]:
        raise RecipeError(f"head.layers: the model has layers -1 to {config.num_hidden_layers}, got {bad}")
    wanted = cut.request_tokens + cut.response_tokens
    if wanted > config.max_position_embeddings:
        raise RecipeError(f"cut: the model's context is {config.max_position_embeddings} tokens, got {wanted}")
