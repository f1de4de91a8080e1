"""Next-token logits of some tokens alone: a large vocabulary makes logits dear."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def predicting(model: Any, is_learned: Tensor) -> Iterator[None]:
    """Within it a model's logits are those that the learned tokens are drawn from, (N, V), row by row.

    Each is that of the token before, so the first token of a row must not be learned. What the model reads after the
    tokens has no logits.

    Args:
        model: any model of transformers with an output head, perhaps with an adapter.
        is_learned: (B, T), N of them true.
    """

    def gather(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        states = args[0]  # (B, T or more, D)
        return (states[:, : is_learned.shape[1] - 1][is_learned[:, 1:]],)

    hook = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        hook.remove()
