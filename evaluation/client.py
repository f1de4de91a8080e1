"""The way to a running server."""

import argparse
from typing import NamedTuple

from openai import OpenAI


class Server(NamedTuple):
    """A client, and the name of the model that the server lists first."""

    client: OpenAI
    model: str


def add_arguments(parser: argparse.ArgumentParser, *, key: str) -> None:
    """Add what `connect` reads; `key` says what the API key is for."""
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of the server (%(default)s)")
    parser.add_argument("--api-key", default="none", help=f"key {key}, where the server asks for one")


def connect(args: argparse.Namespace, timeout: float = 300) -> Server:
    """Return the way to the server of a command line.

    Raises:
        OpenAIError: if it cannot be reached, or refuses the key.
        ValueError: if it serves no model.
    """
    client = OpenAI(base_url=f"{args.server}/v1", api_key=args.api_key, timeout=timeout)
    models = client.models.list().data
    if not models:
        raise ValueError(f"{args.server} lists no model")
    return Server(client, models[0].id)
