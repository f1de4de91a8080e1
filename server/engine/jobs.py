"""One request on its way through the engine, shared by the event loop and the engine's thread."""

import asyncio
import contextlib
from collections.abc import Callable
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
    loop: asyncio.AbstractEventLoop
    forget: Callable[["Job[T]"], object]
    """Drops it from the event loop's books; called there."""
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

    def post(self, item: object) -> None:
        """Hand an item to the event loop; called by the worker."""
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody is listening any more
            self.is_aborted = True

    def end(self, last: object) -> None:
        """Hand over the last item, when the place of the job is free already; called by the worker."""
        self.drop()
        self.post(last)
        self.post(_END)

    def drop(self) -> None:
        """Free the place of the job; called by the worker."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.forget, self)


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
