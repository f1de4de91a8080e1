"""The way to a running server."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from openai import OpenAI, OpenAIError

TIMEOUT_S = 600.0
"""For one answer: long, because a server with one GPU may be behind with others."""
PARALLEL = 16
"""Requests in flight, unless a command is told another number. A server that batches answers them together."""


class Server(NamedTuple):
    """A client, and the name of a model that the server lists."""

    client: OpenAI
    model: str


def add_arguments(parser: argparse.ArgumentParser, *, key: str) -> None:
    """Add what `connect` takes; `key` says what the API key is for."""
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of the server (%(default)s)")
    parser.add_argument("--api-key", default="none", help=f"key {key}, where the server asks for one")


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Add the option `--parallel`, a number of at least 1."""
    parser.add_argument("--parallel", type=_at_least_one, default=PARALLEL, help="requests in flight (%(default)s)")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def connect(address: str, api_key: str = "none", model: str | None = None) -> Server:
    """Return the way to a model of the server at an address, by default the one that it lists first.

    Args:
        address: with or without `/v1` at its end.
        api_key: of the caller.
        model: one of those that the server lists.

    Raises:
        OpenAIError: if it cannot be reached, or refuses the key.
        ValueError: if it serves no such model, or is none of the OpenAI API.
    """
    address = address.rstrip("/").removesuffix("/v1")
    client = OpenAI(base_url=f"{address}/v1", api_key=api_key, timeout=TIMEOUT_S)
    try:
        names = [one.id for one in client.models.list().data]
    except (AttributeError, TypeError) as error:  # what the client makes of a web page
        raise ValueError(f"{address}/v1/models lists no models as the OpenAI API does") from error
    if not names:
        raise ValueError(f"{address} lists no model")
    if model is not None and model not in names:
        raise ValueError(f"{address} lists no model {model!r}, but {names}")
    return Server(client, model or names[0])


@contextmanager
def naming(address: str) -> Iterator[None]:
    """Say of what the client raises which server it is of.

    Raises:
        OSError: in its place.
    """
    try:
        yield
    except OpenAIError as error:
        said = (
            f"{address}: {str(error).rstrip('.')}; what was answered is kept, and the same command goes on from there"
        )
        raise OSError(said) from error
