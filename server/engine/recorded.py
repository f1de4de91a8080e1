"""Forward passes of few rows, recorded by their number and played again: one call instead of hundreds.

A pass that was recorded reads its tokens, their places and the slots of their keys and values from tensors that stay
where they are, and that are filled anew before it is played. On a GPU it is a CUDA graph, on a CPU the calls of the
compiled code of the layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.guarded_lm import GuardedLM
from model.safety_head import Passage
from server.engine.attention import Reads, SlotAttention
from server.engine.graph_heads import GraphHeads, Said
from server.engine.taped import TapedLayers

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of the passes that are recorded; those between are filled up with rows that read nothing."""
GPU_SIZES = (*SIZES, 96, 128)
WITH_HEADS = ("cuda",)
"""Devices on which the heads are part of a pass; on a CPU they take as long by themselves."""
NUM_FIXED = 5
"""Numbers of a row: what it is, where it is, whether it is a `[CLS]`, where it is kept, how long its response is."""
MOST_READ = 1 << 20
"""Slots that all rows of a pass read together."""


class Laid(NamedTuple):
    """The R rows of a pass."""

    ids: Sequence[int]
    """Their tokens; 0 for a copy of `[CLS]`."""
    places: Sequence[int]
    """Their position ids."""
    is_copy: Sequence[bool]
    """Which of them are copies of `[CLS]`."""
    new: Tensor
    """Slots where their keys and values are kept, (R,)."""
    lists: Mapping[int | None, Mapping[int, Tensor]]
    """Slots that each of them reads, by sliding window and row."""
    passages: Mapping[int, Passage]
    """The responses that the token head reads one more token of, by row."""


Found = tuple[Tensor, tuple[Tensor, ...] | None]
"""Logits of every row (R, V), and states of every row by layer, (1, R, D) each, or None where nobody reads them."""


def forward(
    lm: GuardedLM, ids: Tensor, places: Tensor, is_copy: Tensor, logits_of: Tensor | int, *, has_states: bool = True
) -> Found:
    """Return what a model gives of R rows whose attention has been prepared.

    Args:
        lm: the model.
        ids: (R,).
        places: (R,).
        is_copy: (R,), of any type.
        logits_of: the rows that logits are asked of, all of them for 0.
        has_states: states are returned, where there is a signal.
    """
    inputs = lm.model.get_input_embeddings()(ids)
    if lm.cls is not None:
        inputs = torch.where(is_copy.bool()[:, None], lm.cls.embedding.to(inputs), inputs)
    output = lm.model(
        inputs_embeds=inputs[None],
        position_ids=places[None],
        use_cache=False,
        output_hidden_states=has_states and (lm.head is not None or lm.cls is not None),
        logits_to_keep=logits_of,
    )
    return output.logits[0], output.hidden_states


class Recorded:
    """The recorded passes of one model.

    Args:
        lm: the model.
        attention: its attention; what its stores are now is what the passes read.
        windows: sliding windows of its layers.
        layers: on a CPU, its compiled layers; without them passes are run, not played.

    Raises:
        RuntimeError: if a pass does what cannot be recorded.
        ValueError: likewise.
    """

    def __init__(
        self, lm: GuardedLM, attention: SlotAttention, windows: set[int | None], layers: Sequence[nn.Module] = ()
    ) -> None:
        self._lm = lm
        self._attention = attention
        self._device = lm.model.device
        self._windows = list(windows)
        self._has_states = lm.head is not None or lm.cls is not None
        self._is_gpu = self._device.type == "cuda"
        self._taped = TapedLayers(lm.model, layers) if layers else None
        self._sizes = GPU_SIZES if self._is_gpu else SIZES
        most = self._sizes[-1]
        num_numbers = NUM_FIXED * most + len(self._windows) * (most + 1)
        self._numbers, self._staged = self._both(num_numbers)
        self._slots, self._staged_slots = zip(*(self._both(MOST_READ) for _ in self._windows), strict=True)
        self._rows = torch.arange(most, device=self._device)
        self._pool = torch.cuda.graph_pool_handle() if self._is_gpu else None
        self._heads = GraphHeads(lm, most) if self._device.type in WITH_HEADS else None
        try:
            self._passes = {size: self._record(size) for size in reversed(self._sizes)}
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Have the layers run as they did before."""
        if self._taped is not None:
            self._taped.close()

    @property
    def has_heads(self) -> bool:
        """Whether the heads are part of the passes: then `Laid.passages` is read."""
        return self._heads is not None

    def play(self, laid: Laid) -> tuple[Tensor, tuple[Tensor, ...] | None, Said | None] | None:
        """Return what the model gives of these rows, and on a GPU what the heads say; None if it was not recorded.

        Logits and states stay until the next pass.
        """
        num_rows = len(laid.ids)
        size = self._size_of(num_rows)
        num_read = {window: sum(map(len, lists.values())) for window, lists in laid.lists.items()}
        if size is None or max(num_read.values()) > MOST_READ:
            return None
        (ids, places, is_copy, new, lengths), offsets = self._parts(self._staged)
        ids[:num_rows] = torch.tensor(laid.ids)
        places[:num_rows] = torch.tensor(laid.places)
        is_copy[:num_rows] = torch.tensor(laid.is_copy)
        new[:num_rows] = laid.new
        new[num_rows:] = self._attention.num_slots  # of nobody
        for number, window in enumerate(self._windows):
            lists = laid.lists[window]
            num_slots = torch.tensor([len(lists[row]) for row in range(num_rows)])
            offsets[number][0] = 0
            offsets[number][1 : num_rows + 1] = num_slots.cumsum(0)
            offsets[number][num_rows + 1 :] = num_read[window]
            staged = self._staged_slots[number][: num_read[window]]
            torch.cat([lists[row] for row in range(num_rows)], out=staged)
            if self._is_gpu:
                self._slots[number][: len(staged)].copy_(staged, non_blocking=True)
        if self._heads is None:
            logits, states = self._passes[size]()
            return logits[:num_rows], states, None
        passages = [laid.passages.get(row) for row in range(num_rows)]
        lengths[:num_rows] = torch.tensor([1 if passage is None else len(passage) + 1 for passage in passages])
        self._heads.fill(passages)
        self._numbers.copy_(self._staged, non_blocking=True)
        logits, states = self._passes[size]()
        return logits[:num_rows], states, self._heads.said(size, num_rows)

    def again(self, num_rows: int) -> Found:
        """Play what was played last, as a pass of this many rows: for measurements."""
        return self._passes[self._size_of(num_rows) or self._sizes[-1]]()

    def _both(self, count: int) -> tuple[Tensor, Tensor]:
        """Return a tensor of integers that stays, and one on the CPU to fill it from: there the same."""
        staged = torch.zeros(count, dtype=torch.long, pin_memory=self._is_gpu)
        return staged.to(self._device), staged

    def _parts(self, numbers: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the tokens, places, copies, new slots and lengths of the most rows, and the offsets of each window."""
        most = self._sizes[-1]
        fixed = numbers[: NUM_FIXED * most].view(NUM_FIXED, most)
        return list(fixed), list(numbers[NUM_FIXED * most :].view(len(self._windows), most + 1))

    def _record(self, size: int) -> Callable[[], Found]:
        """Return what plays the pass of this many rows."""
        fixed, offsets = self._parts(self._numbers)
        ids, places, is_copy, new, lengths = (part[:size] for part in fixed)

        def run(*, has_states: bool = True) -> Found:
            self._attention.prepare(
                new,
                {
                    window: Reads(self._rows[:size], self._slots[number], offsets[number][: size + 1], ())
                    for number, window in enumerate(self._windows)
                },
            )
            logits, states = forward(self._lm, ids, places, is_copy, 0, has_states=has_states)
            if self._heads is not None:
                self._heads.read(logits, states or (), lengths)
            return logits, states

        new.fill_(self._attention.num_slots)  # the slot of nobody
        if self._is_gpu:
            return self._captured(run)
        return run if self._taped is None else self._on_tape(self._taped, run, size)

    def _captured(self, run: Callable[[], Found]) -> Callable[[], Found]:
        """Return what plays a pass on a GPU."""
        with torch.cuda.device(self._device):
            aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped there
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):  # whatever is made once is made
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                found = run()

        def play() -> Found:
            graph.replay()
            return found

        return play

    def _on_tape(self, taped: TapedLayers, run: Callable[..., Found], size: int) -> Callable[[], Found]:
        """Return what plays a pass on a CPU, having seen that it gives what it gives when it is run.

        Between the two another pass of as many rows is run, so that what a call failed to write is not there.
        """
        self._fill(0)
        noted = taped.note(run)
        before_last = noted.states[:-1]

        def play() -> Found:
            with taped.playing(noted):
                logits, _ = run(has_states=False)
            return logits, (*before_last, taped.last) if self._has_states else None

        self._fill(size)
        logits, states = run()
        expected = [logits, *(states or ())]
        self._fill(2 * size)
        run()
        play()
        self._fill(size)
        logits, states = play()
        found = [logits, *(states or ())]
        if len(expected) != len(found) or not all(map(torch.equal, expected, found)):
            raise ValueError("a pass that is played does not give what it gives when it is run")
        return play

    def _fill(self, seed: int) -> None:
        """Have rows of random tokens at random places read the first slot, which stays as it is, and that of nobody."""
        generator = torch.Generator().manual_seed(seed)
        (ids, places, _, new, _), offsets = self._parts(self._numbers)
        ids.random_(self._lm.vocab_size, generator=generator)
        places.random_(self._lm.context_length, generator=generator)
        new.fill_(self._attention.num_slots)
        for slots, of_rows in zip(self._slots, offsets, strict=True):
            slots[: 2 * len(ids)] = torch.tensor([0, self._attention.num_slots]).repeat(len(ids))
            of_rows.copy_(2 * torch.arange(len(of_rows)))

    def _size_of(self, num_rows: int) -> int | None:
        """Return of how many rows the pass is in which this many are played; None for too many."""
        return next((size for size in self._sizes if size >= num_rows), None)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; from a GPU it comes faster into memory that it can write to by itself."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    found.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return found
