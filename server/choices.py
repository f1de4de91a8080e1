"""The choices of one chat completion: submitted together, their events merged, aborted together."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from model.events import Event, Finish
from model.request import GenerationRequest
from server.engine.engine import Engine, EngineError
from server.metrics import ChoiceMeter


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
            streams = [engine.submit(name, request) for name, request in zip(self._ids, requests, strict=True)]
        except Exception:
            self.close()
            raise
        self._tasks = [asyncio.create_task(self._pump(index, stream)) for index, stream in enumerate(streams)]

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield every event until each choice has finished; raise the first error of any."""
        num_open = len(self._tasks)
        while num_open:
            index, item = await self._arrived.get()
            if isinstance(item, Exception):
                raise item
            self._meters[index].see(item)
            num_open -= isinstance(item, Finish)
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
            raise EngineError("the engine ended a response without finishing it")
        except Exception as error:
            self._arrived.put_nowait((index, error))
