"""The token head: from hidden states that exist already to a request risk and a response risk.

Source: the layout of ShieldHead (ACL 2025) and Qwen3Guard-Stream (arXiv 2510.14276): separate heads
for request and response on the generator's own states. Deviations: the trunk is frozen, each head
is one small product, and standardisation of the states is part of the head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import TokenHeadConfig


class HeadOutput(NamedTuple):
    """Logits of the two risks at N positions. NaN means that the head failed there."""

    request: Tensor  # (N,)
    response: Tensor  # (N,)


class RiskHead(nn.Module):
    """One logit per position from standardised states: linear, or with one hidden layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.hidden = nn.Linear(size, hidden) if hidden else None
        self.out = nn.Linear(hidden or size, 1)

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (N,) of float32 `states` (N, S)."""
        x = (states - self.mean) / self.std  # (N, S)
        if self.hidden is not None:
            x = nn.functional.gelu(self.hidden(x))  # (N, hidden)
        logits: Tensor = self.out(x)[:, 0]
        return logits


class TokenHead(nn.Module):
    """The two risk heads side by side, in float32. They share nothing but the states that they read.

    Each has its own standardisation: the request is always read at the same template token, whose states
    differ from those of response tokens.
    """

    def __init__(self, config: TokenHeadConfig) -> None:
        super().__init__()
        self.config = config
        size = len(config.layers) * config.width
        self.request = RiskHead(size, config.hidden)
        self.response = RiskHead(size, config.hidden)

    def forward(self, states: Tensor) -> HeadOutput:
        """Return the logits of both risks.

        Args:
            states: hidden states of the configured layers side by side, (N, layers * D), any dtype.
        """
        states = states.float()
        return HeadOutput(self.request(states), self.response(states))
