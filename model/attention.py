"""What the `[CLS]` token reads, and who reads it: spans as ranges, masks as booleans. No model here.

Source: Li & Kim 2025 (arXiv 2505.17072), strategic attention, rules R1 to R4. In a cache `[CLS]` stands in slot 0
and the tokens of the sequence after it. A pass that assesses has a copy of `[CLS]` behind its tokens, or several;
the newest one moves to slot 0 afterwards. Tokens are counted from 0 at the first token of the request, `[CLS]` not
included.

Deviations: R2 reads the request too (the text says only the latest r2 tokens, the abstract and the authors' code say
both); which of the published masks the authors' code builds is not known.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """How many response tokens an assessment reads, by rule."""

    r1: int = 10
    """Of a malicious request: the first r1."""
    r2: int = 10
    """Of a benign one: the latest r2; and before a turning point."""
    r3: int = 10
    """After a turning point."""

    def __post_init__(self) -> None:
        if min(self.r1, self.r2, self.r3) < 1:
            raise ValueError(f"r1, r2 and r3 must be at least 1, got {self.r1}, {self.r2} and {self.r3}")


def window(length: int, windows: Windows, *, is_malicious: bool, turned_at: int | None = None) -> range:
    """Return the response tokens that an assessment reads, counted from 0 at the first response token.

    R1, a malicious request: the first r1. R3, a response that turned: r2 before the turning point to r3 after it.
    R2, otherwise: the latest r2; a turn that cleared is no turn any more, so R3 falls back to it.

    Args:
        length: response tokens that exist, the newest included.
        windows: r1, r2 and r3.
        is_malicious: the request risk is over its threshold.
        turned_at: response tokens before the first suspicious one of the current run; None where the newest
            assessment is clear.

    Raises:
        ValueError: if the turning point lies outside the response.
    """
    if turned_at is not None and not 0 <= turned_at <= length:
        raise ValueError(f"a response of {length} tokens cannot turn at {turned_at}")
    if is_malicious:
        return range(min(length, windows.r1))
    if turned_at is not None:
        return range(max(0, turned_at - windows.r2), min(length, turned_at + windows.r3))
    return range(max(0, length - windows.r2), length)


class Span(NamedTuple):
    """One assessment of a response: what it covers, and what of that it reads."""

    covers: int
    """How many response tokens; 0 assesses the request alone."""
    read: range
    """The response tokens that `window` chose."""


def pass_mask(
    content: Sequence[bool],
    first: int,
    stop: int,
    spans: Sequence[Span] = (),
    *,
    sliding_window: int | None = None,
    is_read: bool = True,
) -> Tensor:
    """Return which slots the rows of one pass read, (T + K, 1 + stop + K), true where they may.

    The rows are the tokens `first` to `stop`, then a copy of `[CLS]` for each span. The slots are `[CLS]` as it was
    before the pass, every token so far, then the copies.

    Tokens are causal among themselves. A request token reads no `[CLS]` at all, so its keys and values are those of
    the plain model. The response token number p, counted from 1, reads the newest copy that covers at most p tokens,
    or else slot 0, whatever the sliding window: no token reads an assessment that has seen a later one. A copy reads
    itself, the client's own text (R4: never a template token, and padding is in no cache) and its window.

    A pass over a whole sequence with all its spans is therefore what decoding it token by token computes.

    Args:
        content: for every request token, whether it is the client's text.
        first: the first token of this pass.
        stop: the token after its last one.
        spans: the assessments of this pass, covering more and more.
        sliding_window: how many tokens a token reads, itself included; None for all.
        is_read: response tokens read `[CLS]`; off is the published ablation.

    Raises:
        ValueError: if the spans are not in order, or cover tokens after `stop`.
    """
    num_request, num_tokens = len(content), stop - first
    covered = [span.covers for span in spans]
    if sorted(set(covered)) != covered or (covered and covered[-1] > max(0, stop - num_request)):
        raise ValueError(f"spans must cover more and more of {stop - num_request} response tokens, got {covered}")
    mask = torch.zeros(num_tokens + len(spans), 1 + stop + len(spans), dtype=torch.bool)
    query, key = torch.arange(first, stop)[:, None], torch.arange(stop)[None]  # (T, 1), (1, stop)
    causal = key <= query
    if sliding_window is not None:
        causal &= key > query - sliding_window
    mask[:num_tokens, 1 : 1 + stop] = causal
    if is_read:
        for token in range(max(first, num_request), stop):
            newest = bisect_right(covered, token - num_request + 1)
            mask[token - first, stop + newest if newest else 0] = True
    text = torch.tensor(content, dtype=torch.bool)
    for copy, (_, read) in enumerate(spans):
        row = mask[num_tokens + copy]
        row[1 : 1 + num_request] = text
        row[1 + num_request + read.start : 1 + num_request + read.stop] = True
        row[1 + stop + copy] = True
    return mask


def pass_places(first: int, stop: int, num_request: int, spans: Sequence[Span], *, moves: bool) -> list[int]:
    """Return the position of every row of `pass_mask`: the tokens, then the copies.

    Args:
        first: the first token of this pass.
        stop: the token after its last one.
        num_request: tokens of the request.
        spans: the assessments of this pass.
        moves: a copy takes the position of the newest token that it covers, instead of position 0.
    """
    return [*range(first, stop), *(num_request + span.covers - 1 if moves else 0 for span in spans)]
