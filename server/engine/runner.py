"""Runs the passes of many sequences as one forward pass, over a cache in pages.

Tokens and copies of `[CLS]` of all sequences are rows of one batch without padding; where their keys and values lie,
and what each row reads, is the sequence's own. What comes out is what `model.passes.Solo` gives of each pass.
"""

import logging
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from model.attention import pass_mask, pass_places
from model.chat import EncodedPrompt
from model.cls_signal import sliding_windows
from model.errors import origin
from model.generation import PREFILL_CHUNK
from model.guarded_lm import GuardedLM
from model.passes import Pass, Passed
from server.engine.assessing import Ran, assess, is_one_more
from server.engine.attention import Block, Reads, SlotAttention
from server.engine.engine import EngineError
from server.engine.kv_cache import NOTHING, PagedSeats, Rows, Seat, num_pages_of
from server.engine.pages import PAGE_SIZE, Pages
from server.engine.quick_head import quicken
from server.engine.recorded import Laid, Recorded, forward, on_cpu
from server.engine.seats import run_one

logger = logging.getLogger(__name__)

FEW = 4
"""Most rows of a sequence that read by lists of slots."""
NUM_ROWS = PREFILL_CHUNK + 64
"""Of a step: a piece of a prompt, and what is being written."""
GPU_NUM_ROWS = 4 * PREFILL_CHUNK
"""As many of them take a GPU little longer."""
SAME = 0.99
"""Least cosine of two vectors of logits that are the same but for rounding, which deep and wide models amplify."""


def _longest_refusal(lm: GuardedLM) -> int:
    """Return how many tokens a refusal may have, to the next page."""
    if lm.config is None:
        return 0
    num_tokens = len(lm.refusal_ids) + lm.config.refusal.max_tokens
    return num_pages_of(num_tokens + 1) * PAGE_SIZE


def cosine_of(logits: Tensor, others: Tensor) -> float:
    """Return the cosine of two vectors of logits, (V,), each without its mean."""
    ours, theirs = (some.float().cpu() - some.float().cpu().mean() for some in (logits, others))
    return float(cosine_similarity(ours, theirs, dim=0))


class PagedRunner(PagedSeats):
    """The model, its cache, and the sequences in it. A `server.engine.seats.Runner`.

    Args:
        lm: the model; its attention is changed to read from this cache alone.
        num_pages: pages of `PAGE_SIZE` tokens.

    Raises:
        ValueError: if the model's attention cannot be changed.
    """

    def __init__(self, lm: GuardedLM, num_pages: int) -> None:
        super().__init__(
            num_pages,
            context_length=lm.context_length,
            has_head=lm.head is not None,
            has_cls=lm.cls is not None,
            num_spare=_longest_refusal(lm),
        )
        self._lm = lm
        self._device = lm.model.device
        self._windows = {None, *sliding_windows(lm.model).values()}
        self._attention = SlotAttention(lm.model, num_pages * PAGE_SIZE)
        if lm.head is not None:
            quicken(lm.head)
        self.recorded: Recorded | None = None
        """Passes of few rows that are played instead of run."""
        self.num_rows = GPU_NUM_ROWS if self._device.type == "cuda" else NUM_ROWS

    def check(self, ids: tuple[int, ...], expected: Tensor) -> None:
        """See that a row by itself, many rows and then one more give the logits, (V,), that the model itself gives.

        Raises:
            ValueError: if they do not, or a layer has not read from the cache.
        """
        seat = self.open(EncodedPrompt(ids), watches_request=False)
        try:
            *_, last = (run_one(self, seat, Pass(some)) for some in (ids[:1], ids[1:-1], ids[-1:]))
        finally:
            self.close(seat)
        if self._attention.num_layers != (num_layers := self._lm.model.config.get_text_config().num_hidden_layers):
            raise ValueError(f"{self._attention.num_layers} of {num_layers} layers read from the cache")
        if not cosine_of(last.logits, expected) > SAME:
            raise ValueError("the logits are not those of the model itself")

    def resize(self, num_bytes: int) -> None:
        """Forget everything and take this much memory, which decides how many pages there are.

        Raises:
            EngineError: if not even a few pages fit.
        """
        num_pages = num_bytes // (self._attention.bytes_per_slot * PAGE_SIZE)
        self.pages = Pages(num_pages)
        if self.longest < PAGE_SIZE:
            raise EngineError(f"the cache has {num_pages} pages, too few for any request; give it more memory")
        self.recorded = None  # it reads what is forgotten now
        self._attention.resize(num_pages * PAGE_SIZE)

    @torch.inference_mode()
    def record(self, layers: Sequence[nn.Module] = ()) -> None:
        """Record passes of few rows; see `Recorded`."""
        self.recorded = Recorded(self._lm, self._attention, self._windows, layers)

    def run(self, batch: Sequence[tuple[Seat, Pass]]) -> list[Passed | Exception]:
        """Run one pass of each sequence, and return what came of each.

        After a fault each is run again by itself, and only those fail that fail alone.
        """
        before = [(seat, copy(seat.query), copy(seat.response), seat.newest, seat.length) for seat, _ in batch]
        try:
            return list(self._run(batch))
        except Exception as error:
            for seat, query, response, newest, length in before:
                seat.query, seat.response, seat.newest, seat.length = query, response, newest, length
            if len(batch) == 1:
                return [error]
            logger.warning("a pass of %d sequences failed, each is run again alone: %s", len(batch), origin(error))
            return [self.run([one])[0] for one in batch]

    @torch.inference_mode()
    def _run(self, batch: Sequence[tuple[Seat, Pass]]) -> list[Passed]:
        laid: list[Rows] = []
        for seat, asked in batch:
            laid.append(self.lay(seat, asked, laid[-1].stop if laid else 0))
        num_rows = laid[-1].stop if laid else 0
        ran = self._forward(batch, laid, num_rows) if num_rows else Ran(torch.empty(0), [0] * len(batch), None)
        passed = assess(self._lm, batch, laid, ran)
        for seat, asked in batch:
            self.settle(seat, asked)
        return passed

    def _forward(self, batch: Sequence[tuple[Seat, Pass]], laid: Sequence[Rows], num_rows: int) -> Ran:
        """Run the rows of all passes."""
        lm = self._lm
        ids: list[int] = []
        places: list[int] = []
        is_copy: list[bool] = []
        new, last = [], []
        lists: dict[int | None, dict[int, Tensor]] = {window: {} for window in self._windows}
        blocks: dict[int | None, list[Block]] = {window: [] for window in self._windows}
        for (seat, asked), rows in zip(batch, laid, strict=True):
            first, stop = seat.length + rows.num_skipped, seat.length + len(asked.token_ids)
            copies = torch.tensor(self.copies(seat, rows.num_copies)) if rows.num_copies else NOTHING
            ids += [*asked.token_ids[rows.num_skipped :], *[0] * rows.num_copies]
            is_copy += [False] * rows.num_tokens + [True] * rows.num_copies
            places += pass_places(first, stop, len(seat.prompt.request), asked.spans, moves=lm.cls_config.moves)
            new += [seat.slots[first:stop], copies]
            last.append(rows.first + max(0, rows.num_tokens - 1))
            for window in self._windows:
                self._read(seat, asked, rows, copies, window, lists[window], blocks[window])
        last = [min(row, num_rows - 1) for row in last]
        passages = {}
        if self.recorded is not None and self.recorded.has_heads:
            both = zip(batch, laid, strict=True)
            passages = {rows.first: seat.response for (seat, asked), rows in both if is_one_more(asked)}
        pass_of = Laid(ids, places, is_copy, torch.cat(new), lists, passages)
        played = self.recorded.play(pass_of) if self.recorded is not None and not any(blocks.values()) else None
        if played is not None:
            logits, states, said = played
            return Ran(on_cpu(logits), last, states, said)  # of all rows: to pick some of them would copy them
        reads = {window: Reads.of(lists[window], blocks[window], self._device) for window in self._windows}
        self._attention.prepare(pass_of.new.to(self._device), reads)
        of_ids, of_places, of_copies = (torch.tensor(some, device=self._device) for some in (ids, places, is_copy))
        logits, states = forward(lm, of_ids, of_places, of_copies, torch.tensor(last, device=self._device))
        # On the CPU, where they are drawn from. This waits for the pass, so that the heads' time is their own.
        return Ran(on_cpu(logits), range(len(batch)), states)

    def _read(
        self,
        seat: Seat,
        asked: Pass,
        rows: Rows,
        copies: Tensor,
        window: int | None,
        lists: dict[int, Tensor],
        blocks: list[Block],
    ) -> None:
        """Add what the rows of a pass read."""
        lm, num_rows = self._lm, rows.num_tokens + rows.num_copies
        first, stop = seat.length + rows.num_skipped, seat.length + len(asked.token_ids)
        if rows.num_tokens <= 1 and (lm.cls is None or first >= len(seat.prompt.request)):
            has_token = rows.num_tokens == 1
            read = seat.read(
                stop, asked.spans, copies, has_token=has_token, is_read=lm.reads_cls, sliding_window=window
            )
            lists |= enumerate(read, rows.first)
            return
        if not num_rows:
            return
        content = seat.prompt.content or (True,) * len(seat.prompt.request)
        mask = pass_mask(content, first, stop, asked.spans, sliding_window=window, is_read=lm.reads_cls)
        slots = torch.cat([torch.tensor([seat.newest_copy]), seat.slots[:stop], copies])
        if num_rows > FEW:
            blocks.append(Block(rows.first, slots, mask))
        else:
            lists |= {rows.first + row: slots[mask[row]] for row in range(num_rows)}
