"""The server as a process: one socket, one event loop, a stop that lets requests finish."""

import asyncio
import socket

import structlog
import uvicorn

from server.app import create_app
from server.engine.engine import EngineError, EngineState
from server.service import ModelEngine
from server.settings import Settings

logger = structlog.get_logger(__name__)

AFTER_DRAIN_S = 5
"""Seconds after the drain in which the last bytes leave; more than `server.sse.LAST_BYTES_S`."""


class Process(uvicorn.Server):
    """Serves until it is told to stop, or until the model turns out not to load, or the engine fails for good.

    At a stop the socket stays open while running requests finish, so that a new request and a probe
    get a clear 503 instead of a closed port.
    """

    def __init__(self, settings: Settings, engine: ModelEngine) -> None:
        self._settings = settings
        self._engine = engine
        self.failure: Exception | None = None
        """Why the model did not load, or the engine does not go on."""
        self._address: tuple[str, int] = (settings.host, settings.port)
        app = create_app(settings, engine, on_started=self._started)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=AFTER_DRAIN_S,
        )
        super().__init__(config)

    def serve_at(self, listener: socket.socket) -> None:
        """Serve on `listener` until the end."""
        self._address = listener.getsockname()[:2]
        try:
            self.run(sockets=[listener])
        except KeyboardInterrupt:  # raised again by uvicorn once everything is closed
            return

    async def on_tick(self, counter: int) -> bool:
        """Tell whether to stop, ten times a second: with an engine that is gone, a new process is better than none."""
        if self._engine.state is EngineState.STOPPED and self.failure is None:
            self.failure = EngineError("the engine has failed and does not go on; the log says why")
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let the engine finish what runs, then close everything. A second interrupt does not wait."""
        if self._engine.state is EngineState.READY:
            logger.info("stopping", drain_s=self._settings.drain_s)
            drain = asyncio.create_task(self._engine.stop(drain_s=self._settings.drain_s))
            while not drain.done() and not self.force_exit:
                await asyncio.wait({drain}, timeout=0.1)
        await super().shutdown(sockets)

    def _started(self, error: Exception | None) -> None:
        if error is not None:
            self.failure = error
            self.should_exit = True
            return
        host, port = self._address
        logger.info(f"ready at http://{f'[{host}]' if ':' in host else host}:{port}/v1")


def listen(settings: Settings) -> socket.socket:
    """Return the socket to serve on.

    Raises:
        OSError: if the address is in use, or none of this machine's.
    """
    found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return socket.create_server(address[:2], family=family)
