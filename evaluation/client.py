"""The way to a running server."""

import argparse
from typing import NamedTuple

from openai import OpenAI

TIMEOUT_S = 600.0
"""For one answer: long, because a server with one GPU may be behind with others."""
PARALLEL = 16
"""Requests in flight. A server that batches answers them together."""


class Server(NamedTuple):
    """A client, and the name of the model that the server lists first."""

    client: OpenAI
    model: str


def add_arguments(parser: argparse.ArgumentParser, *, key: str) -> None:
    """Add what `connect` takes; `key` says what the API key is for."""
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of the server (%(default)s)")
    parser.add_argument("--api-key", default="none", help=f"key {key}, where the server asks for one")


def connect(address: str, api_key: str = "none") -> Server:
    """Return the way to the server at an address without `/v1`.

    Raises:
        OpenAIError: if it cannot be reached, or refuses the key.
        ValueError: if it serves no model.
    """
    client = OpenAI(base_url=f"{address}/v1", api_key=api_key, timeout=TIMEOUT_S)
    models = client.models.list().data
    if not models:
        raise ValueError(f"{address} lists no model")
    return Server(client, models[0].id)
