"""A real server on a loopback socket, with a model that says its script."""

import contextlib
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
import structlog
import uvicorn
from torch import Tensor

from model.config import Side
from model.guarded_lm import Assessed, GuardedLM, StepOutput
from model.testing import ScriptedLM
from server.app import create_app
from server.engine.local import LocalEngine
from server.engine.paged import paged
from server.engine.seats import Runner, Solos
from server.settings import Settings

MODEL = "tiny"


class SlowLM(ScriptedLM):
    """Takes 10 ms for every forward pass, so that a test can act in between."""

    def forward(self, *args: Any, **kwargs: Any) -> StepOutput:
        time.sleep(0.01)
        return super().forward(*args, **kwargs)


class BrokenHeadLM(SlowLM):
    """Its head gives no number on one side, `request` or `response`, once it is told so."""

    broken: str | None = None

    def assess(self, side: Side, features: Tensor) -> Assessed:
        found = super().assess(side, features)
        return found._replace(logits=[math.nan] * len(features)) if side == self.broken else found


@dataclass
class Server:
    """A running server and ways to talk to it."""

    url: str
    engine: LocalEngine
    http: httpx2.Client

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=20)

    def chat(self, text: str = "hello", **fields: Any) -> Any:
        return self.client().chat.completions.create(
            model=MODEL, messages=fields.pop("messages", [{"role": "user", "content": text}]), **fields
        )

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx2.Response:
        body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}
        return self.http.post(path, json=body)

    def stream(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the events of a streamed chat completion; the stream must end with [DONE]."""
        lines = [line for line in self.post(stream=True, **fields).text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def metric(self, line: str) -> float:
        """Return the value of one sample of /metrics, 0 if it is not there."""
        for found in self.http.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.split()[-1])
        return 0.0


Serve = Callable[..., Server]


def settings(**changes: Any) -> Settings:
    return Settings(**{"model": MODEL, "drain_s": 5, **changes})


@contextlib.contextmanager
def running(engine: LocalEngine, configured: Settings, *, wait: bool = True) -> Iterator[Server]:
    """Serve on a free port in a thread until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(configured, engine)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with httpx2.Client(base_url=url, timeout=20) as http:
            deadline = time.monotonic() + 30
            while wait and http.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline, "the server is not ready after 30 s"
                time.sleep(0.01)
            yield Server(url, engine, http)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BALLAST_"):
            monkeypatch.delenv(name)


def _log_nowhere() -> None:
    """Servers log from their threads, which would mix with what pytest writes."""
    structlog.reset_defaults()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    _log_nowhere()


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Put logging back as it was, after a test that configures it for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    _log_nowhere()


def seated(lm: GuardedLM) -> Runner:
    """Return the cache in pages for a real model; what is scripted has no keys and values."""
    return paged(lm, 8 << 20) if type(lm) is GuardedLM else Solos(lm)


@contextlib.contextmanager
def _starter() -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(
            script: str = "good day.",
            *,
            lm: Callable[[], GuardedLM] | None = None,
            slow: bool = False,
            max_running: int = 8,
            max_waiting: int = 64,
            wait: bool = True,
            **changes: Any,
        ) -> Server:
            load = lm or (lambda: (SlowLM if slow else ScriptedLM)(script))
            engine = LocalEngine(load, seat=seated, max_running=max_running, max_waiting=max_waiting)
            configured = settings(max_running=max_running, max_waiting=max_waiting, **changes)
            return stack.enter_context(running(engine, configured, wait=wait))

        yield start


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start servers that live until the test ends: `serve("what the model says", setting=value)`."""
    with _starter() as start:
        yield start


@pytest.fixture(scope="module")
def serve_all() -> Iterator[Serve]:
    """Start servers for all tests of a file."""
    with _starter() as start:
        yield start


@pytest.fixture
def scripted() -> type[ScriptedLM]:
    """The model that says its script."""
    return ScriptedLM


@pytest.fixture
def serve_broken(serve: Serve) -> Callable[..., Server]:
    """Start a server whose head fails on one side: `serve_broken("response", "what it says")`."""

    def start(side: str, script: str = "good day.", **changes: Any) -> Server:
        lm = BrokenHeadLM(script)
        server = serve(lm=lambda: lm, **changes)
        lm.broken = side  # only now: a server whose head fails at the start does not serve
        return server

    return start


@pytest.fixture(scope="module")
def polite(serve_all: Serve) -> Server:
    """A server whose model answers "good day." to everything; shared by the tests of a file."""
    return serve_all("good day.")
