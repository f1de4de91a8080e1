"""What each optimiser step of a fine-tuning learns: which rows, how deep a prefix, and how much a token weighs.

A step is a function of the seed and its number alone, so an interrupted run goes on exactly, and every process
of a parallel one sees the same step.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from model.attention import Span, Windows, window
from model.chat import ChatTemplate, Message
from model.errors import TemplateError
from training.config import Cut
from training.dialogues import Dialogue
from training.errors import DataError
from training.objectives import IGNORED, recovery_depth, share_weights
from training.tune_config import Recovery, Signal

RowKey = tuple[str, int]
"""The name of a part and the number of one of its rows."""


class Encoded(NamedTuple):
    """Token ids of one dialogue."""

    request: tuple[int, ...]
    response: tuple[int, ...]
    """With the token that ends it, unless it was cut."""
    harmful: tuple[int, ...] = ()
    content: tuple[bool, ...] = ()
    """For every request token, whether it is the client's text."""
    request_label: int | None = None
    response_label: int | None = None
    is_ended: bool = False
    """The response ends with the token that ends one."""


class Example(NamedTuple):
    """One sequence to learn from."""

    ids: tuple[int, ...]
    num_given: int
    """Tokens that are read and not learned: the request, and a harmful prefix."""
    weight: float
    """Of each learned token in the loss of its step."""
    row: RowKey
    is_distilled: bool = False
    """Its responses are learned as the plain model expects them."""
    spans: tuple[Span, ...] = ()
    """The assessments of `[CLS]`. A harmful prefix is response."""
    span_labels: tuple[int | None, ...] = ()
    """What each assessment finds, where that is known; empty where one label is of the whole response."""
    request_label: int | None = None
    response_label: int | None = None
    content: tuple[bool, ...] = ()


@dataclass(frozen=True)
class EncodedPart:
    """The rows of one part, and how a step draws from them."""

    name: str
    rows: Sequence[Encoded]
    share: float
    per_step: int
    recovery: Recovery | None
    openings: Sequence[tuple[int, ...]] = ()
    """Harmless responses, with one of which each of the part's harmful responses begins."""
    longest_opening: int = 0
    is_distilled: bool = False


SETTLED = 8
"""Tokens of harm after which an assessment must find it."""


def encode(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    cut: Cut,
    response_tokens: int | None = None,
    *,
    end: int | None = None,
) -> list[Encoded]:
    """Return the ids of each dialogue. Request, harmful prefix and response are joined as ids, never as text.

    Args:
        dialogues: what to encode.
        tokenizer: with the chat template that serves.
        cut: longer requests lose their beginning, longer responses their end and with it the end token.
        response_tokens: cut responses here if that is sooner, but no harmful prefix.
        end: the token that ends a response; None takes the tokenizer's.

    Raises:
        DataError: if the tokenizer has no token that ends a response, the chat template refuses a prompt, or a
            response holds the token that ends one.
    """
    end = tokenizer.eos_token_id if end is None else end
    if not isinstance(end, int):
        raise DataError("the tokenizer has no token that ends a response")
    template = ChatTemplate(tokenizer, marks_content=True)
    num_response = min(cut.response_tokens, response_tokens or cut.response_tokens)

    def ids(text: str, where: str) -> tuple[int, ...]:
        found = tuple(tokenizer.encode(text, add_special_tokens=False))
        if end in found:
            raise DataError(f"{where}: a response holds {tokenizer.decode([end])}, the token that ends one")
        return found

    def encoded(dialogue: Dialogue) -> Encoded:
        where = dialogue.where
        try:
            prompt = template.encode([Message("user", dialogue.prompt)])
        except TemplateError as error:
            raise DataError(f"{where}: {error}") from error
        response = (*ids(dialogue.response, where), *([end] if dialogue.is_complete else []))
        return Encoded(
            prompt.request[-cut.request_tokens :],
            response[:num_response],
            ids(dialogue.harmful, where)[: cut.response_tokens] if dialogue.harmful else (),
            prompt.content[-cut.request_tokens :],
            dialogue.request_label,
            dialogue.response_label,
            end in response[:num_response],
        )

    return [encoded(dialogue) for dialogue in dialogues]


class Steps(Dataset[Example]):
    """The examples of all steps, one after another; those of one step stand together, shortest first.

    Each part goes through its rows in an order of its own, newly shuffled every time round, and draws the depth of
    each harmful prefix anew.

    Args:
        parts: what a step is made of.
        num_steps: optimiser steps.
        seed: decides orders and depths.
        signal: assess each response with `[CLS]` at random depths; None does not.
    """

    def __init__(self, parts: Sequence[EncodedPart], num_steps: int, seed: int, signal: Signal | None = None) -> None:
        self.per_step = sum(part.per_step for part in parts)
        self._parts = parts
        self._num_steps = num_steps
        self._seed = seed
        self._signal = signal
        self._step = lru_cache(maxsize=4)(self._make)

    def __len__(self) -> int:
        return self._num_steps * self.per_step

    def __getitem__(self, index: int) -> Example:
        step, place = divmod(index, self.per_step)
        return self._step(step)[place]

    def rows(self) -> dict[RowKey, Encoded]:
        """Return the rows that any step draws."""
        of_part = {part.name: part.rows for part in self._parts}
        drawn = sorted({example.row for example in (self[index] for index in range(len(self)))})
        return {(name, number): of_part[name][number] for name, number in drawn}

    def _make(self, step: int) -> list[Example]:
        """Return the examples of one step."""
        drawn = [self._draw(part, step) for part in self._parts]
        counts = [sum(len(example.ids) - example.num_given for example in examples) for examples in drawn]
        shares = [part.share for part in self._parts]
        weights = share_weights(torch.tensor(counts, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64))
        weighted = [
            example._replace(weight=weight)
            for examples, weight in zip(drawn, weights.tolist(), strict=True)
            for example in examples
        ]
        return sorted(weighted, key=lambda example: len(example.ids))

    def _draw(self, part: EncodedPart, step: int) -> list[Example]:
        """Return the examples of one part, not yet weighted."""
        examples = []
        for place in range(step * part.per_step, (step + 1) * part.per_step):
            times_round, turn = divmod(place, len(part.rows))
            number = self._order(part.name, len(part.rows), times_round)[turn]
            row = part.rows[number]
            depth = 0
            if part.recovery is not None:
                depth = recovery_depth(
                    len(row.harmful),
                    _generator(self._seed, "depth", part.name, place),
                    probability=part.recovery.probability,
                    deepest=part.recovery.deepest,
                )
            opening = _opening(part, _generator(self._seed, "opening", part.name, place))
            given = (*row.request, *row.harmful[:depth])
            response = (*opening, *row.response)[: max(len(row.response), len(opening) + SETTLED)]
            example = Example((*given, *response), len(given), 0.0, (part.name, number), part.is_distilled)
            examples.append(self._assessed(example, row, place, depth, len(opening)))
        return examples

    def _assessed(self, example: Example, row: Encoded, place: int, depth: int, num_opening: int) -> Example:
        """Return the example with the assessments that `[CLS]` is trained on: none of the response, and random depths.

        Responses to malicious requests are read by rule R1 or R2, whichever a coin says: a rule that followed from the
        response's label would give the label away. R3 needs the signal's own verdict on where a response turned, and
        is not trained. A response that turns has no label as a whole: what is known of it is where it turns.
        """
        if self._signal is None:
            return example
        # What ends a response is never fed when it is served.
        length = max(1, len(example.ids) - len(row.request) - row.is_ended)
        generator = _generator(self._seed, "assessments", example.row[0], place)
        drawn = torch.randint(1, length + 1, (self._signal.depths - 1,), generator=generator).tolist()
        windows = Windows(*self._signal.windows)
        # By R1 a harmless opening would be all that is read, and labelled by what follows it.
        is_r1 = bool(torch.rand((), generator=generator) < 0.5) and row.request_label == 1 and not num_opening
        covered = sorted({0, *drawn, length})
        turns = depth > 0 or num_opening > 0
        num_harmful = depth if row.request_label == 1 else 0
        return example._replace(
            spans=tuple(Span(covers, window(covers, windows, is_malicious=is_r1)) for covers in covered),
            span_labels=tuple(_span_label(covers, num_harmful, num_opening) for covers in covered) if turns else (),
            request_label=row.request_label,
            response_label=None if turns else row.response_label,
            content=row.content,
        )

    @lru_cache(maxsize=8)  # noqa: B019 - a dataset lives as long as its run
    def _order(self, name: str, num_rows: int, times_round: int) -> list[int]:
        order: list[int] = torch.randperm(num_rows, generator=_generator(self._seed, name, times_round)).tolist()
        return order


def _opening(part: EncodedPart, generator: torch.Generator) -> tuple[int, ...]:
    """Return the beginning of a harmless response, if the part's responses shall turn."""
    if not part.openings:
        return ()
    chosen = part.openings[int(torch.randint(len(part.openings), (), generator=generator))]
    longest = max(1, min(len(chosen), part.longest_opening))
    return chosen[: int(torch.randint(1, longest + 1, (), generator=generator))]


def _span_label(covers: int, num_harmful: int, num_opening: int) -> int | None:
    """Return what is known of the first `covers` tokens of a response that turns: 1 for harm, 0 for none, or None.

    Args:
        covers: how many tokens an assessment covers.
        num_harmful: tokens of a harmful prefix, after which the response refuses; 0 without one.
        num_opening: tokens of a harmless opening, after which the response harms; 0 without one.
    """
    if num_opening:
        return 0 if covers <= num_opening else 1 if covers >= num_opening + SETTLED else None
    return 1 if SETTLED <= covers <= num_harmful else None


def _generator(*key: object) -> torch.Generator:
    """Return a generator that `key` alone decides."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """Return one padded batch: `input_ids`, `attention_mask`, `labels`, (B, T); `weights`, `is_distilled`, (B,)."""
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for place, example in enumerate(examples):
        length, given = len(example.ids), example.num_given
        ids[place, :length] = torch.tensor(example.ids)
        mask[place, :length] = 1
        labels[place, given:length] = torch.tensor(example.ids[given:])
    weights = torch.tensor([example.weight for example in examples], dtype=torch.float32)
    is_distilled = torch.tensor([example.is_distilled for example in examples])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "weights": weights,
        "is_distilled": is_distilled,
    }
