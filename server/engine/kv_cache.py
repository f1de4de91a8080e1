"""Sequences in a cache of pages: who has which slots, what was fed, and what must be fed again. No model here."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention import Span
from model.chat import EncodedPrompt
from model.generation import PREFILL_CHUNK
from model.passes import Pass
from model.safety_head import Passage
from server.engine.pages import PAGE_SIZE, Pages, keys_of
from server.engine.scheduler import Size

NOTHING = torch.empty(0, dtype=torch.long)


@dataclass(eq=False)
class Seat:
    """One sequence in the cache."""

    prompt: EncodedPrompt
    names: Sequence[str]
    """Of the full pages of the request."""
    num_shared: int
    """Pages of the request that may be taken from others before anything was read of it."""
    pages: list[int] = field(default_factory=list)
    slots: Tensor = NOTHING
    """Of every token there is room for."""
    num_cached: int = 0
    """Tokens of the prompt whose keys and values were there before."""
    length: int = 0
    """Tokens whose keys and values are there."""
    fed: list[int] = field(default_factory=list)
    """All tokens that were fed."""
    spans: dict[int, Span] = field(default_factory=dict)
    """All that `[CLS]` assessed, by what it covered."""
    copies: list[int] = field(default_factory=list)
    """Pages of `[CLS]`."""
    newest_copy: int = 0
    """Slot of the newest `[CLS]`."""
    query: Passage = field(default_factory=Passage)
    response: Passage = field(default_factory=Passage)
    newest: Tensor | None = None
    """What the head reads at the response tokens fed last, (N, 2 * S)."""

    @cached_property
    def text(self) -> Tensor:
        """Which tokens of the request are the client's text."""
        return torch.tensor(self.prompt.content or (True,) * len(self.prompt.request)).nonzero()[:, 0]

    def read(
        self,
        stop: int,
        spans: Sequence[Span],
        copies: Tensor,
        *,
        has_token: bool,
        is_read: bool,
        sliding_window: int | None,
    ) -> list[Tensor]:
        """Return the slots that each row of a pass of one response token at most reads, as `pass_mask` has them.

        Args:
            stop: the token after the newest one.
            spans: what copies of `[CLS]` assess.
            copies: their slots.
            has_token: the newest token is a row; without a `[CLS]` signal it may be of the request.
            is_read: response tokens read `[CLS]`.
            sliding_window: how many tokens a token reads, itself included; None for all.
        """
        found, border = [], len(self.prompt.request)
        if has_token:
            before = self.slots[0 if sliding_window is None else max(0, stop - sliding_window) : stop]
            newest = copies[-1:] if spans else torch.tensor([self.newest_copy])
            found.append(torch.cat([newest, before]) if is_read else before)
        for number, (_, read) in enumerate(spans):
            of_response = self.slots[border + read.start : border + read.stop]
            found.append(torch.cat([self.slots[self.text], of_response, copies[number : number + 1]]))
        return found


class Rows(NamedTuple):
    """The rows of one pass in the batch."""

    first: int
    num_tokens: int
    num_skipped: int
    """Tokens whose keys and values were there before."""
    num_copies: int

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.first + self.num_tokens + self.num_copies


class PagedSeats:
    """The sequences of one model in a cache of pages.

    Args:
        num_pages: pages of `PAGE_SIZE` tokens.
        context_length: of the model.
        has_head: the states of the query are read, so they must be computed.
        has_cls: sequences have copies of `[CLS]` in the cache.
        num_spare: tokens that may follow the longest request: a refusal.
    """

    most_running = None

    def __init__(self, num_pages: int, *, context_length: int, has_head: bool, has_cls: bool, num_spare: int) -> None:
        self.pages = Pages(num_pages)
        self._num_spare = num_spare
        self._context_length = context_length
        self._has_head = has_head
        self._has_cls = has_cls

    @property
    def num_available(self) -> int:
        """Pages that nobody has."""
        return self.pages.num_available

    @property
    def usage(self) -> float:
        """Share of the pages that sequences have, 0 to 1."""
        return 1.0 - self.pages.num_available / self.pages.num_pages

    def reset(self) -> None:
        """Forget all sequences."""
        self.pages = Pages(self.pages.num_pages)

    @property
    def longest(self) -> int:
        """Most tokens that one sequence can have, all others evicted."""
        num_copies = num_pages_of(PREFILL_CHUNK + 1) if self._has_cls else 0
        return min(self._context_length, (self.pages.num_pages - num_copies) * PAGE_SIZE - self._num_spare)

    def open(self, prompt: EncodedPrompt, *, salt: str = "", watches_request: bool = True) -> Seat:
        """Return a seat for a sequence, with what is there of its prompt already.

        Args:
            prompt: what will be fed first.
            salt: sequences share pages only where it is equal.
            watches_request: the states of the query will be read, so they must be computed.
        """
        names = keys_of(prompt.request, salt)
        last = len(prompt.request) - 1  # its logits, and what `[CLS]` finds, come from a pass
        known = min(prompt.query_start, last) if watches_request and self._has_head else last
        seat = Seat(prompt, names, known // PAGE_SIZE)
        self._find(seat, seat.num_shared)
        return seat

    def _find(self, seat: Seat, most: int) -> None:
        """Take what is there of the first pages of a request; nothing was fed yet."""
        if len(seat.pages) >= most:
            return
        self.pages.give_back(seat.pages)
        seat.pages = self.pages.find(seat.names[:most])
        seat.slots, seat.num_cached = _slots(seat.pages), len(seat.pages) * PAGE_SIZE

    def close(self, seat: Seat) -> None:
        """Give back every page of a sequence."""
        self.pages.give_back([*seat.pages, *seat.copies])
        seat.pages, seat.copies = [], []

    def evict(self, seat: Seat) -> None:
        """Take a sequence's pages; what the heads read of it stays."""
        self.close(seat)
        seat.slots, seat.length, seat.num_cached = NOTHING, 0, 0

    def next_pass(self, seat: Seat, asked: Pass) -> Pass:
        """Return the pass that a sequence asked for, or before it one over what was evicted.

        One pass with all copies of `[CLS]` computes what was computed with them one after the other.
        """
        wanted = len(seat.fed) if asked.restarts_at is None else asked.restarts_at
        num_request = len(seat.prompt.request)
        if not seat.length:  # what was not there at the beginning may be there by now
            self._find(seat, min(wanted, num_request - 1) // PAGE_SIZE if wanted else seat.num_shared)
        if seat.length >= wanted:
            return asked
        stop = min(wanted, seat.length + PREFILL_CHUNK)
        spans = [span for n, span in sorted(seat.spans.items()) if seat.length < num_request + n <= stop]
        return Pass(seat.fed[seat.length : stop], spans=spans)

    def size_of(self, seat: Seat, asked: Pass) -> Size:
        """Return what a pass takes."""
        start = seat.length if asked.restarts_at is None else asked.restarts_at
        num_tokens = max(0, num_pages_of(start + len(asked.token_ids)) - len(seat.pages))
        num_copies = num_pages_of(len(asked.spans) + 1) - len(seat.copies) if asked.spans else 0
        num_rows = len(asked.token_ids) - _num_skipped(seat, start, asked) + len(asked.spans)
        return Size(num_rows, num_tokens + max(0, num_copies), self.pages.num_own([*seat.pages, *seat.copies]))

    def lay(self, seat: Seat, asked: Pass, first: int) -> Rows:
        """Make room for a pass and return its rows."""
        if asked.restarts_at is not None:
            self._crop(seat, asked.restarts_at)
        stop = seat.length + len(asked.token_ids)
        if (missing := num_pages_of(stop) - len(seat.pages)) > 0:
            seat.pages += self._take(missing)
            seat.slots = _slots(seat.pages)
        if asked.spans and (missing := num_pages_of(len(asked.spans) + 1) - len(seat.copies)) > 0:
            seat.copies += self._take(missing)
        skipped = _num_skipped(seat, seat.length, asked)
        return Rows(first, len(asked.token_ids) - skipped, skipped, len(asked.spans))

    def _take(self, count: int) -> list[int]:
        taken = self.pages.take(count)
        if taken is None:
            raise ValueError(f"{count} pages are needed, {self.pages.num_available} are there")
        return taken

    def _crop(self, seat: Seat, length: int) -> None:
        kept = num_pages_of(length)
        self.pages.give_back(seat.pages[kept:])
        seat.pages, seat.length = seat.pages[:kept], min(seat.length, length)
        seat.slots = _slots(seat.pages)
        del seat.fed[length:]
        seat.spans = {}
        seat.response, seat.newest = Passage(), None

    def copies(self, seat: Seat, count: int) -> list[int]:
        """Return slots for this many copies of `[CLS]`, none of them that of the newest one."""
        slots = (slot for page in seat.copies for slot in range(page * PAGE_SIZE, (page + 1) * PAGE_SIZE))
        return list(islice((slot for slot in slots if slot != seat.newest_copy), count))

    def settle(self, seat: Seat, asked: Pass) -> None:
        """Note what was fed, share the pages of the request that are full now, and keep the newest `[CLS]` alone."""
        before, seat.length = seat.length, seat.length + len(asked.token_ids)
        seat.fed[before : seat.length] = asked.token_ids
        seat.spans |= {span.covers: span for span in asked.spans}
        for number in range(before // PAGE_SIZE, min(seat.length // PAGE_SIZE, len(seat.names))):
            self.pages.share(seat.pages[number], seat.names[number])
        if asked.spans:
            seat.newest_copy = self.copies(seat, len(asked.spans))[-1]
            kept = seat.newest_copy // PAGE_SIZE
            self.pages.give_back([page for page in seat.copies if page != kept])
            seat.copies = [kept]


def num_pages_of(num_tokens: int) -> int:
    """Return how many pages this many tokens take."""
    return -(-num_tokens // PAGE_SIZE)


def _num_skipped(seat: Seat, start: int, asked: Pass) -> int:
    """Return how many tokens of a pass that begins at `start` were there before."""
    return min(max(0, seat.num_cached - start), len(asked.token_ids))


def _slots(pages: Sequence[int]) -> Tensor:
    """Return the slots of some pages, in order."""
    return (torch.tensor(pages, dtype=torch.long)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
