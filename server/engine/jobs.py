"""One request on its way through the engine, shared by the event loop and the engine's thread."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from model.chat import EncodedPrompt
from model.guarded_lm import GuardedLM
from model.passes import Pass, Steps

T = TypeVar("T")

_END = object()


@dataclass(eq=False)
class Job(Generic[T]):
    """A request."""

    request_id: str
    prompt: EncodedPrompt
    begin: Callable[[GuardedLM], Steps[T, T]]
    salt: str = ""
    watches_request: bool = True
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    is_aborted: bool = False
    """Nobody waits for it any more: it ends before its next pass. Either thread may say so, and never takes it back."""
    # The rest is the worker's alone.
    arrival: int = 0
    num_passes: int = 0
    steps: Steps[T, T] | None = None
    seat: Any = None
    asked: Pass | None = None
    """The pass that it wants next."""


class Mail:
    """What the worker tells the jobs of an event loop, handed over once a step: each time costs both threads.

    Args:
        loop: the event loop.
        forget: drops a job from its books; called there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, forget: Callable[[Job[Any]], object]) -> None:
        self._loop = loop
        self._forget = forget
        self._items: list[tuple[Job[Any], Sequence[object], bool]] = []

    def tell(self, job: Job[Any], item: object) -> None:
        """Add an item of a job that goes on."""
        self._items.append((job, (item,), False))

    def end(self, job: Job[Any], *last: object) -> None:
        """Add the last items of a job, before which its place is free; none where nobody listens any more."""
        self._items.append((job, (*last, _END) if last else (), True))

    def send(self) -> None:
        """Hand over what was added."""
        items, self._items = self._items, []
        if not items:
            return
        try:
            self._loop.call_soon_threadsafe(self._deliver, items)
        except RuntimeError:  # the loop is closed: nobody is listening any more
            for job, _, _ in items:
                job.is_aborted = True

    def _deliver(self, items: Sequence[tuple[Job[Any], Sequence[object], bool]]) -> None:
        for job, told, is_over in items:
            if is_over:
                self._forget(job)
            for item in told:
                job.outbox.put_nowait(item)


class Items(Generic[T]):
    """The results of a job as an async iterator; closing it aborts the job, even before it began."""

    def __init__(self, job: Job[T]) -> None:
        self._job = job
        self._is_over = False

    def __aiter__(self) -> "Items[T]":
        return self

    async def __anext__(self) -> T:
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._job.outbox.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if item is _END:
            self._is_over = True
            raise StopAsyncIteration
        if isinstance(item, Exception):
            self._is_over = True
            raise item
        return item  # type: ignore[no-any-return]  # the queue mixes items, errors and the end

    async def aclose(self) -> None:
        """Abort the job."""
        self._is_over = True
        self._job.is_aborted = True
