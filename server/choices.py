"""The choices of one chat completion: submitted together, their events merged, aborted together."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from model.events import Event, Finish
from model.request import GenerationRequest
from server.engine.engine import Engine, EngineError
from server.metrics import ChoiceMeter

UNFINISHED = "the engine ended a response without finishing it"


class Choices:
    """Events of several sequences as they come, each with the index of its choice.

    Args:
        engine: generates them.
        completion_id: begins the engine's id of every sequence; unique.
        requests: one per choice, in order.
        meters: one per choice; each sees its choice's events.

    Raises:
        InvalidRequest, Overloaded, EngineError: as `Engine.submit`; then no sequence stays queued.
    """

    def __init__(
        self, engine: Engine, completion_id: str, requests: Sequence[GenerationRequest], meters: Sequence[ChoiceMeter]
    ) -> None:
        self._engine = engine
        self._ids = [f"{completion_id}-{request.choice}" for request in requests]
        self._meters = meters
        self._arrived: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        try:
            self._streams = [engine.submit(name, request) for name, request in zip(self._ids, requests, strict=True)]
        except Exception:
            self.close()
            raise
        if len(self._streams) > 1:
            self._tasks = [asyncio.create_task(self._pump(index, one)) for index, one in enumerate(self._streams)]

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield every event until each choice has finished; raise the first error of any."""
        num_open = len(self._streams)
        merged = self._merged() if self._tasks else ((0, item) async for item in self._streams[0])
        async with aclosing(merged):
            async for index, item in merged:
                self._meters[index].see(item)
                num_open -= isinstance(item, Finish)
                yield index, item
                if not num_open:
                    return
        raise EngineError(UNFINISHED)

    async def _merged(self) -> AsyncGenerator[tuple[int, Event], None]:
        while True:
            index, item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            yield index, item

    def close(self) -> None:
        """Abort what still runs. Needs no await, so it works in a cancelled task too."""
        for name in self._ids:
            self._engine.abort(name)
        for task in self._tasks:
            task.cancel()

    async def _pump(self, index: int, events: AsyncIterator[Event]) -> None:
        try:
            async for event in events:
                self._arrived.put_nowait((index, event))
                if isinstance(event, Finish):
                    return
            raise EngineError(UNFINISHED)
        except Exception as error:
            self._arrived.put_nowait((index, error))
