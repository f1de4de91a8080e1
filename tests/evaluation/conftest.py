"""A stand-in for the server: real HTTP, answers made up by the test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from openai import OpenAI

from evaluation.intervals import Estimate, bootstrap

Answer = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw intervals from at most 50 resamples: most tests do not look at them."""

    def few(*of: Any, resamples: int = 1000, **more: Any) -> Estimate:
        return bootstrap(*of, resamples=min(50, resamples), **more)

    for module in ("evaluation.judge", "evaluation.signal"):
        monkeypatch.setattr(f"{module}.bootstrap", few)


class Stub(ThreadingHTTPServer):
    """Lists one model and gives every POST to `answer`. Keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = answer
        self.models = ["stub"]
        self.asked: list[dict[str, Any]] = []
        self.status_of: Callable[[dict[str, Any]], int] = lambda body: 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        served = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in self.server.models]
        self.reply({"object": "list", "data": served})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append(body)
        self.reply(self.server.answer(body))

    def reply(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(self.server.status_of(body))
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[Callable[[Answer], Stub]]:
    """Start a server with this answer to every POST; it stops with the test."""
    with ExitStack() as stack:

        def start(answer: Answer) -> Stub:
            server = stack.enter_context(Stub(answer))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return server

        yield start


@pytest.fixture
def client_of() -> Callable[[Stub], OpenAI]:
    """Return a client of a stub."""
    return lambda server: OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
