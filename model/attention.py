"""What the `[CLS]` token reads, and who reads it: spans as ranges, masks as booleans. No model here.

Source: Li & Kim 2025 (arXiv 2505.17072), strategic attention, rules R1 to R4. In a cache `[CLS]` stands in slot 0
and the tokens of the sequence after it; in training several copies of it stand before the tokens, one for each
assessment. Tokens are counted from 0 at the first token of the request, `[CLS]` not included.

Deviations: R2 reads the request too (the text says only the latest r2 tokens, the abstract and the authors' code say
both); which of the published masks the authors' code builds is not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


def assessment_mask(content: Sequence[bool], read: range) -> Tensor:
    """Return which slots the `[CLS]` row of an assessment reads, (S,), true where it may.

    It reads itself and the client's own text; R4: never a template token, and padding is in no cache.

    Args:
        content: for every request token, whether it is the client's text.
        read: the response tokens that `window` chose.
    """
    request = torch.tensor(content, dtype=torch.bool)  # (n,)
    response = torch.zeros(read.stop, dtype=torch.bool)
    response[read.start :] = True
    return torch.cat([torch.ones(1, dtype=torch.bool), request, response])


def token_mask(first: int, stop: int, num_request: int, *, sliding_window: int | None = None) -> Tensor:
    """Return which slots the tokens `first` to `stop` read, (T, S) with S = 1 + stop, true where they may.

    Causal as ever among tokens. Slot 0 is read by response tokens, whatever the sliding window, and never by the
    request, whose keys and values are therefore those of the plain model.

    Args:
        first: the first token of this pass.
        stop: the token after its last one.
        num_request: tokens of the request.
        sliding_window: how many tokens a token reads, itself included; None for all.
    """
    query, key = torch.arange(first, stop)[:, None], torch.arange(stop)[None]  # (T, 1), (1, S - 1)
    causal = key <= query
    if sliding_window is not None:
        causal &= key > query - sliding_window
    return torch.cat([query >= num_request, causal], dim=1)


def training_mask(
    content: Sequence[bool],
    num_response: int,
    assessments: Sequence[tuple[int, range]],
    *,
    sliding_window: int | None = None,
    is_read: bool = True,
) -> Tensor:
    """Return the mask of one sequence with a copy of `[CLS]` per assessment, (T, T) with T = copies + tokens.

    It is what cached decoding computes: copy j reads itself, the request and its window; response token number p,
    counted from 1, reads the newest copy that covers at most p tokens. So no token reads an assessment that has
    seen a later token, and many depths are trained in one pass without a leak.

    Args:
        content: for every request token, whether it is the client's text.
        num_response: tokens of the response.
        assessments: how many response tokens each copy covers, and which of them it reads; the first covers none.
        sliding_window: how many tokens a token reads, itself included; None for all.
        is_read: response tokens read `[CLS]`; off is the published ablation.

    Raises:
        ValueError: if the first assessment covers response tokens, or they are not in order.
    """
    covered = [covers for covers, _ in assessments]
    if not covered or covered[0] != 0 or sorted(set(covered)) != covered:
        raise ValueError(f"assessments must cover 0 response tokens first and then more and more, got {covered}")
    num_request, num_copies = len(content), len(assessments)
    num_tokens = num_request + num_response
    mask = torch.zeros(num_copies + num_tokens, num_copies + num_tokens, dtype=torch.bool)
    for copy, (_, read) in enumerate(assessments):
        slots = assessment_mask(content, read)
        mask[copy, copy] = True
        mask[copy, num_copies : num_copies + len(slots) - 1] = slots[1:]
    tokens = token_mask(0, num_tokens, num_request, sliding_window=sliding_window)  # (n, 1 + n)
    mask[num_copies:, num_copies:] = tokens[:, 1:]
    for number in range(1, num_response + 1):
        current = max(copy for copy, covers in enumerate(covered) if covers <= number)
        mask[num_copies + num_request + number - 1, current] = is_read
    return mask


def training_places(
    num_request: int, num_response: int, assessments: Sequence[tuple[int, range]], *, moves: bool
) -> list[int]:
    """Return the position of every row of `training_mask`'s sequence: the copies, then the tokens.

    Args:
        num_request: tokens of the request.
        num_response: tokens of the response.
        assessments: how many response tokens each copy covers, and which of them it reads.
        moves: a copy takes the position of the newest token that it covers, instead of position 0.
    """
    copies = [num_request + covers - 1 if moves else 0 for covers, _ in assessments]
    return [*copies, *range(num_request + num_response)]
