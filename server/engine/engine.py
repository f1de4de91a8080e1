"""What the HTTP layer may ask of an engine. Nothing here knows HTTP.

The interface holds only what any engine could give: token ids in, events out, by request id.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from model.chat import EncodedPrompt
from model.events import Event, HeadWork
from model.request import GenerationRequest
from model.trace import Trace


class EngineError(Exception):
    """The engine could not finish a request; the request itself was fine."""


class Overloaded(EngineError):
    """The queue is full. `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineState(str, Enum):
    """The life of an engine."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing now, and did so far."""

    num_running: int
    num_waiting: int
    head: HeadWork
    """All that the head did for requests since the start, for those too that were aborted later."""
    num_restarts: int = 0
    """Faults of the engine after which it went on."""
    num_evictions: int = 0
    """Sequences whose keys and values made room for others, and had to be computed again."""
    cache_usage: float = 0.0
    """Share of the cache of keys and values that running sequences have, 0 to 1."""


class Engine(Protocol):
    """Generates and scores. All methods are called on the event loop and never block it."""

    @property
    def state(self) -> EngineState:
        """Where in its life the engine is."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that there is room for, its answer included; only once it is ready."""
        ...

    async def start(self) -> None:
        """Load and warm up; return when the first request can be served."""
        ...

    async def stop(self, *, drain_s: float) -> None:
        """Take no new requests, let the running ones end for `drain_s` seconds, then abort them."""
        ...

    def submit(self, request_id: str, request: GenerationRequest) -> AsyncIterator[Event]:
        """Queue a request and return its events; the last one is a `Finish`.

        Closing the iterator early aborts the request.

        Raises (from the iterator or the call):
            InvalidRequest: the request cannot be honoured; nothing was queued.
            Overloaded: the queue is full.
            EngineError: the engine failed, or is stopping.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request before its next forward pass. Unknown ids are ignored."""
        ...

    async def score(self, request_id: str, prompt: EncodedPrompt, *, cache_salt: str = "") -> Trace:
        """Return the trace of a conversation, generating nothing. Raises as `submit`.

        Cancelling it aborts the request.
        """
        ...

    def stats(self) -> EngineStats:
        """Return what the engine is doing now, and did so far."""
        ...
