"""The token head: from hidden states that exist already to a request risk and a response risk.

Source: the layout of ShieldHead (ACL 2025) and Qwen3Guard-Stream (arXiv 2510.14276): separate heads
for request and response on the generator's own states. Deviations: the trunk is frozen, both heads
are one small product, and standardisation of the states is part of the head.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import TokenHeadConfig


class HeadOutput(NamedTuple):
    """Logits of the two risks at N positions. NaN means that the head failed there."""

    request: Tensor  # (N,)
    response: Tensor  # (N,)


class TokenHead(nn.Module):
    """Two logits per position from the standardised states of the configured layers, in float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: TokenHeadConfig) -> None:
        super().__init__()
        self.config = config
        size = len(config.layers) * config.width
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.hidden = nn.Linear(size, 2 * config.hidden) if config.hidden else None
        self.out = nn.Linear(2 * config.hidden if config.hidden else size, 2)

    def forward(self, states: Tensor) -> HeadOutput:
        """Return the logits of both risks.

        Args:
            states: hidden states of the configured layers side by side, (N, layers * D), any dtype.
        """
        x = (states.float() - self.mean) / self.std  # (N, layers * D)
        if self.hidden is not None:
            x = torch.nn.functional.gelu(self.hidden(x))  # (N, 2 * hidden)
        logits = self.out(x)  # (N, 2)
        return HeadOutput(logits[:, 0], logits[:, 1])
