"""Hidden states of labelled rows, computed once with the frozen model and cached on disk.

Of each row it keeps what the request head reads at the last request token, and the state at every response
token, from which `RowStates.passage` makes what the response head reads. Files hold up to 512 rows of one
source and are named by what they were computed from, so a rerun, another recipe or a higher limit reuses them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from model.attention import Span
from model.chat import ChatTemplate, EncodedPrompt, Message
from model.checkpoint import fingerprint_weights
from model.cls_signal import OUTPUTS, sliding_windows
from model.cls_signal import forward as forward_masked
from model.errors import TemplateError
from model.pretrained import Pretrained
from model.safety_head import Passage
from training.config import Cut, HeadRecipe
from training.errors import DataError, RecipeError
from training.progress import tracked
from training.rows import Row
from training.shards import digest, write_atomically
from training.signal_model import padded_masks
from training.subject import ClsReading, Subject

SHARD_ROWS = 512
"""Rows per file: an interruption loses at most this many."""
LARGEST = float(torch.finfo(torch.float16).max)
"""States are kept in half precision; the few larger values of inner layers are limited to this."""


class RowStates(NamedTuple):
    """States of one row, in float16; S is layers * D."""

    request: Tensor  # (2 * S,): the state of the last request token, and the mean over the query
    response: Tensor  # (T, S); T is 0 without a response
    cls_request: float = math.nan
    """Logit of the request that `[CLS]` gives; NaN without one, or where it was not asked."""
    cls_response: Tensor | None = None
    """Logit of `[CLS]` at each response token, (T,) in float32, NaN where it was not assessed, and throughout
    where it was not asked; None without one."""

    def passage(self) -> Tensor:
        """Return what the response head reads at each response token, (T, 2 * S) in float32."""
        return Passage().extend(self.response) if len(self.response) else self.response.new_zeros(0, len(self.request))


class Read(NamedTuple):
    """What the model reads of one row."""

    prompt: EncodedPrompt
    spans: Sequence[Span]
    """The assessments of `[CLS]`; empty without one."""
    is_asked: bool = False
    """What `[CLS]` finds is kept, which takes all layers."""

    @property
    def identity(self) -> list[Any]:
        """What decides its states, beside the model."""
        covered = [[span.covers for span in self.spans], self.is_asked] if self.spans else []
        return [self.prompt.request, self.prompt.prefill, self.prompt.query_start, *covered]

    def tokens(self) -> int:
        """Return how many tokens the model reads."""
        return len(self.prompt.request) + len(self.prompt.prefill)


class Shard(NamedTuple):
    """States of some rows in a row."""

    request: Tensor  # (N, 2 * S)
    response: Tensor  # (sum of T, S)
    ends: Tensor  # (N,): where each row's response ends in `response`
    cls_request: Tensor | None = None  # (N,); None without `[CLS]`, like the next
    cls_response: Tensor | None = None  # (sum of T,)

    def row(self, index: int) -> RowStates:
        """Return the states of one row."""
        start, end = int(self.ends[index - 1]) if index else 0, int(self.ends[index])
        request, response = self.request[index], self.response[start:end]
        if self.cls_request is None or self.cls_response is None:
            return RowStates(request, response)
        return RowStates(request, response, float(self.cls_request[index]), self.cls_response[start:end])

    @classmethod
    def of(cls, rows: Sequence[RowStates]) -> "Shard":
        """Return the rows one after another."""
        found = [row.cls_response for row in rows if row.cls_response is not None]
        return cls(
            torch.stack([row.request for row in rows]),
            torch.cat([row.response for row in rows]),
            torch.tensor([len(row.response) for row in rows]).cumsum(0),
            torch.tensor([row.cls_request for row in rows]) if found else None,
            torch.cat(found) if found else None,
        )


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
        return self.shards[number].row(row)


def encode(row: Row, template: ChatTemplate, cut: Cut) -> EncodedPrompt:
    """Return a row's tokens: the newest of its request, and the first of its response as the prefill."""
    messages = row.messages
    if row.response is None:
        encoded = template.encode(messages)
    else:
        encoded = template.encode((*messages, Message("assistant", row.response)), continue_final=True)
    num_cut = max(0, len(encoded.request) - cut.request_tokens)
    return EncodedPrompt(
        encoded.request[num_cut:],
        encoded.prefill[: cut.response_tokens],
        max(0, encoded.query_start - num_cut),
        encoded.content[num_cut:],
    )


def compute(
    pretrained: Pretrained,
    rows: Sequence[Row],
    layers: Sequence[int],
    cut: Cut,
    *,
    batch_tokens: int,
    cache: Path,
    cls: ClsReading | None = None,
    is_scheduled: bool = False,
) -> States:
    """Return the states of `rows` at `layers`, from the cache as far as they are there.

    `[CLS]` is assessed at each response token of held-out rows, which set thresholds, unless it `is_scheduled`. A token
    head learns from the others: there tokens read it as they do while a response is generated, and nothing of what it
    finds is kept.

    Args:
        pretrained: the frozen model.
        rows: rows of one source must stand together, or they fill more files.
        layers: 0 is the embedding, -1 the final normalised state; several are put side by side.
        cut: most tokens of a request and of a response.
        batch_tokens: tokens of one forward pass, padding included.
        cache: folder of the files.
        cls: the model's `[CLS]` signal, which response tokens may read.
        is_scheduled: `[CLS]` is assessed by its schedule in held-out rows too, as where it has no share in the risk.

    Raises:
        DataError: if the chat template refuses a row.
        RecipeError: if the model has no such layer, or its context cannot hold the cut.
    """
    check(pretrained, layers, cut)
    template = ChatTemplate(pretrained.tokenizer, marks_content=cls is not None)
    inputs = []
    for row in rows:
        held_out = row.part != "train"
        try:
            prompt = encode(row, template, cut)
        except TemplateError as error:
            raise DataError(f"a row of sources.{row.group}: {error}") from error
        spans = cls.spans(len(prompt.prefill), is_given=held_out and not is_scheduled) if cls is not None else []
        inputs.append(Read(prompt, spans, is_asked=held_out and cls is not None))
    identity = [fingerprint_weights(pretrained.model), str(pretrained.model.dtype), list(layers), asdict(cut)]
    if cls is not None:
        identity.append([cls.fingerprint, cls.config.windows, cls.config.moves, cls.config.is_read])
    chunks = list(_chunks([row.group for row in rows]))
    shards = []
    for chunk in tracked(chunks, "states", unit=len):
        read = [inputs[index] for index in chunk]
        name = digest(identity, [row.identity for row in read])[:32]
        path = cache / "states" / f"{name}.safetensors"
        if not path.is_file():
            shard = forward(pretrained, read, layers, batch_tokens, cls)
            kept = {name: tensor for name, tensor in shard._asdict().items() if tensor is not None}
            write_atomically(path, partial(save_file, kept))
        shards.append(Shard(**load_file(path)))
    places = tuple((number, row) for number, chunk in enumerate(chunks) for row in range(len(chunk)))
    return States(tuple(shards), places)


def compute_for(
    recipe: HeadRecipe, subject: Subject, rows: Sequence[Row], layers: Sequence[int], *, is_scheduled: bool = False
) -> States:
    """Return the states of `rows` as `compute` does, of the subject and as its recipe says."""
    return compute(
        subject.pretrained,
        rows,
        layers,
        recipe.cut,
        batch_tokens=recipe.batch_tokens,
        cache=Path(recipe.cache),
        cls=subject.brought.cls,
        is_scheduled=is_scheduled,
    )


def forward(
    pretrained: Pretrained,
    rows: Sequence[Read],
    layers: Sequence[int],
    batch_tokens: int,
    cls: ClsReading | None = None,
) -> Shard:
    """Return the states of some rows, running those of like length together, and no layer above those that are read."""
    states: dict[int, RowStates] = {}
    for is_asked in (False, True):
        indices = [index for index, row in enumerate(rows) if row.is_asked is is_asked]
        with _up_to(pretrained.model, [*layers, *([-1] if is_asked else [])]):
            for places in batches([rows[index].tokens() for index in indices], batch_tokens):
                batch = [indices[place] for place in places]
                chosen = [rows[index] for index in batch]
                found = (
                    _forward_batch(pretrained, [row.prompt for row in chosen], layers)
                    if cls is None
                    else _forward_cls_batch(pretrained, chosen, layers, cls)
                )
                states.update(zip(batch, found, strict=True))
    return Shard.of([states[index] for index in range(len(rows))])


@contextmanager
def _up_to(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Have the model run no layer above those that are read, where its code reads their number from its configuration.

    One more is run, because the last state of a pass is normalised.
    """
    config = model.config.get_text_config()
    whole = config.num_hidden_layers
    try:
        config.num_hidden_layers = whole if -1 in layers else min(whole, max(layers) + 1)
        yield
    finally:
        config.num_hidden_layers = whole


def _forward_batch(pretrained: Pretrained, prompts: Sequence[EncodedPrompt], layers: Sequence[int]) -> list[RowStates]:
    picked = states_of(pretrained, prompts, layers)
    return [_row_states(picked[row], prompt) for row, prompt in enumerate(prompts)]


@torch.inference_mode()
def states_of(pretrained: Pretrained, prompts: Sequence[EncodedPrompt], layers: Sequence[int]) -> Tensor:
    """Return the states of one batch, (B, T, S), padded on the right, where causal attention never looks."""
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
    return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)


@torch.inference_mode()
def _forward_cls_batch(
    pretrained: Pretrained, rows: Sequence[Read], layers: Sequence[int], cls: ClsReading
) -> list[RowStates]:
    """Return the same of a model with `[CLS]`: one pass with a copy for each assessment, as decoding makes them."""
    model: Any = pretrained.model
    tokens = [(*row.prompt.request, *row.prompt.prefill) for row in rows]
    spans = [row.spans for row in rows]
    masks, places, _ = padded_masks(
        [row.prompt.content for row in rows],
        list(map(len, tokens)),
        spans,
        windows=sliding_windows(model),
        is_read=cls.config.is_read,
        moves=cls.config.moves,
    )
    longest = max(map(len, tokens))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in tokens], device=model.device)  # (B, T)
    embedded = model.get_input_embeddings()(ids)
    copies = cls.signal.embedding.to(embedded).expand(len(rows), places.shape[1] - longest, -1)
    output = forward_masked(model.base_model, torch.cat([embedded, copies], dim=1), masks, places, use_cache=False)
    picked = torch.cat([output.hidden_states[layer][:, :longest] for layer in layers], dim=-1)  # (B, T, S)
    # Rows of a batch are all asked or none is, and then the last state may not be the final one.
    logits = cls.signal(output.hidden_states[-1][:, longest:]).cpu() if rows[0].is_asked else None  # (B, K, 2)
    found = []
    for number, row in enumerate(rows):
        response, of_request = torch.full((len(row.prompt.prefill),), torch.nan), math.nan
        if logits is not None:
            of_row = logits[number, : len(row.spans)]  # (1 + K', 2)
            response[[span.covers - 1 for span in row.spans[1:]]] = of_row[1:, OUTPUTS.index("response")].float()
            of_request = float(of_row[0, OUTPUTS.index("request")])
        found.append(_row_states(picked[number], row.prompt)._replace(cls_request=of_request, cls_response=response))
    return found


def _row_states(states: Tensor, prompt: EncodedPrompt) -> RowStates:
    """Return what is kept of the states (T, S) of one row and its padding."""
    num_request = len(prompt.request)
    query = Passage().extend(states[prompt.query_start : num_request])
    response = states[num_request : num_request + len(prompt.prefill)]
    return RowStates(half(query[-1]), half(response))


def half(states: Tensor) -> Tensor:
    """Return states as they are kept: in half precision, on the CPU."""
    return states.clamp(-LARGEST, LARGEST).half().cpu()


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield indices, shortest rows first, so that rows times longest row stays within `batch_tokens`."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
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


def check(pretrained: Pretrained, layers: Sequence[int], cut: Cut) -> None:
    """Refuse layers that the model does not have, and a cut that its context cannot hold.

    Raises:
        RecipeError: saying which.
    """
    config = pretrained.model.config.get_text_config()
    if bad := [layer for layer in layers if not -1 <= layer <= config.num_hidden_layers]:
        raise RecipeError(f"head.layers: the model has layers -1 to {config.num_hidden_layers}, got {bad}")
    wanted = cut.request_tokens + cut.response_tokens
    if wanted > config.max_position_embeddings:
        raise RecipeError(f"cut: the model's context is {config.max_position_embeddings} tokens, got {wanted}")
