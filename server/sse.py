"""Server-sent events: how a stream is written, kept alive, drained and abandoned."""

from collections.abc import AsyncIterator

from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from server.choices import Choices

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE_S = 15
"""Seconds between the comments that keep proxies from closing a quiet stream."""
LAST_BYTES_S = 3
"""Seconds after the drain until a client that does not read is cut off."""


def event(body: BaseModel) -> bytes:
    """Return one event that carries `body`; fields that were never set are left out."""
    return b"data: " + body.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class ChoiceStream(EventSourceResponse):
    """A stream of a chat completion. However it ends, its choices are closed.

    After a stop it has `drain_s` seconds to end by itself. Then the engine ends it with an error, which it still sends;
    it is cut off only if the client does not read that either.
    """

    def __init__(self, body: AsyncIterator[bytes], choices: Choices, *, drain_s: float) -> None:
        super().__init__(
            body,
            ping=KEEP_ALIVE_S,
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
            sep="\n",
            shutdown_grace_period=drain_s + LAST_BYTES_S,
        )
        self._choices = choices

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; close the choices at its end, at a disconnect and on an error alike."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.close()
