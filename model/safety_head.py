"""The token head: from hidden states that exist already to a request risk and a response risk.

Source: the layout of ShieldHead (ACL 2025) and Qwen3Guard-Stream (arXiv 2510.14276): separate heads
for request and response on the generator's own states. Deviations: the trunk is frozen, each head
is one small product, standardisation of the states is part of the head, each state is read beside
the mean of its passage so far (docs/adr/0003), and the query may be read token by token too (docs/adr/0008).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import Side, TokenHeadConfig


class Passage:
    """A run of tokens that is judged as one text: the query, or the response.

    It turns hidden states into what the head reads: each state beside the mean of all states of the
    passage up to it. That mean is a sum that grows with each token, so nothing is computed twice.
    """

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __copy__(self) -> "Passage":
        copied = Passage()  # sums are replaced as it grows, and never written to
        copied._total, copied._length = self._total, self._length
        return copied

    @property
    def total(self) -> Tensor | None:
        """The sum of its states, (S,) in float32; None before the first."""
        return None if isinstance(self._total, float) else self._total

    def grow(self, total: Tensor) -> None:
        """Add one token.

        Args:
            total: the sum of all states, its own among them.
        """
        self._total, self._length = total, self._length + 1

    def extend(self, states: Tensor) -> Tensor:
        """Add the states of the next N tokens and return what the head reads at each of them.

        Args:
            states: hidden states of the head's layers side by side, (N, S) with N >= 1, any dtype.

        Returns:
            (N, 2 * S) in float32.
        """
        states = states.float()
        totals = self._total + states.cumsum(dim=0)  # (N, S)
        lengths = torch.arange(self._length + 1, self._length + len(states) + 1, device=states.device)
        self._total, self._length = totals[-1], self._length + len(states)
        return torch.cat([states, totals / lengths[:, None]], dim=-1)

    def extend_to_last(self, states: Tensor) -> Tensor:
        """Add the states of the next N tokens and return what the head reads at the last of them alone, (1, 2 * S)."""
        self._total, self._length = self._total + states.float().sum(dim=0), self._length + len(states)
        return torch.cat([states[-1].float(), self._total / self._length])[None]


def extend_each(passages: Sequence[Passage], states: Tensor) -> Tensor:
    """Add one token to each of some passages, as `Passage.extend` does to one, and return what the head reads.

    Args:
        passages: N of them, all different.
        states: of the new tokens, (N, S), any dtype.

    Returns:
        (N, 2 * S) in float32.
    """
    states = states.float()
    none = torch.zeros_like(states[0])
    totals = states + torch.stack([none if p.total is None else p.total for p in passages])  # (N, S)
    lengths = torch.tensor([len(passage) + 1 for passage in passages], device=states.device)
    for passage, total in zip(passages, totals, strict=True):
        passage.grow(total)
    return torch.cat([states, totals / lengths[:, None]], dim=-1)


class RiskHead(nn.Module):
    """One logit per position from standardised features (F of them): linear, or with one hidden layer."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.hidden = nn.Linear(size, hidden) if hidden else None
        self.out = nn.Linear(hidden or size, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (N,) of float32 `features` (N, F)."""
        x = (features - self.mean) / self.std  # (N, F)
        if self.hidden is not None:
            x = nn.functional.gelu(self.hidden(x))  # (N, hidden)
        logits: Tensor = self.out(x)[:, 0]
        return logits


class TokenHead(nn.Module):
    """The risk heads side by side, in float32. They share nothing but the states that they read.

    Request and response are read as `Passage.extend` gives them. Each has its own standardisation: the request is
    always read at the same template token, whose states differ from those of response tokens. The head of the query,
    if there is one, reads the state alone, at every token of the query: the mean of a long one says little of a part.
    """

    def __init__(self, config: TokenHeadConfig) -> None:
        super().__init__()
        self.config = config
        size = 2 * len(config.layers) * config.width
        self.request = RiskHead(size, config.hidden)
        self.response = RiskHead(size, config.hidden)
        self.query = RiskHead(size // 2, config.hidden) if config.reads_query else None

    def of(self, side: Side) -> RiskHead:
        """Return the head of one side."""
        return self.request if side == "request" else self.response
