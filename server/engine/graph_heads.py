"""The heads within a recorded pass on a GPU: launched by themselves they take far longer than they compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.cls_signal import OUTPUTS
from model.config import Side
from model.guarded_lm import GuardedLM
from model.safety_head import Passage


@dataclass(frozen=True)
class Said:
    """What the heads say of the R rows of a pass, as if each were the next token of a response, or a `[CLS]`."""

    totals: Tensor
    """Sums of the states of each response with its new token, (R, S) in float32; S is 0 without a token head."""
    features: Tensor
    """What the token head reads, (R, 2 * S)."""
    table: Tensor
    """By row, (R, 4) on the CPU: the first token of the highest logit; logits of the response by the token head, and of
    request and response by `[CLS]`. Not there before the GPU has done what it was given."""

    @cached_property
    def _rows(self) -> list[list[float]]:
        return self.table.tolist()

    def likeliest(self, row: int) -> int:
        """Return the first token of the highest logit after a row."""
        return int(self._rows[row][0])

    def response(self, row: int) -> float:
        """Return the logit of a response by the token head."""
        return self._rows[row][1]

    def cls(self, side: Side, row: int) -> float:
        """Return the logit of one side by a `[CLS]`."""
        return self._rows[row][2 + OUTPUTS.index(side)]


class GraphHeads:
    """The heads of a model; what they read and say lies in tensors that stay where they are.

    Args:
        lm: the model.
        most: rows of the largest pass.
    """

    def __init__(self, lm: GuardedLM, most: int) -> None:
        self._lm = lm
        head, device = lm.head, lm.model.device
        size = len(head.config.layers) * head.config.width if head is not None else 0
        self._nothing = torch.zeros(size, device=device)
        self._before = torch.zeros(most, size, device=device)  # sums without the new tokens
        self._found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by number of rows

    def fill(self, passages: Sequence[Passage | None]) -> None:
        """Take the responses whose next token each row is; None for a row that is nothing of the kind."""
        totals = [None if passage is None else passage.total for passage in passages]
        before = [self._nothing if total is None else total for total in totals]
        torch.stack(before, out=self._before[: len(before)])

    def read(self, logits: Tensor, states: Sequence[Tensor], lengths: Tensor) -> None:
        """Compute what `said` returns of passes of so many rows, in the tensors of the newest call.

        Args:
            logits: (R, V).
            states: by layer, (1, R, D).
            lengths: of each response with its new token, (R,).
        """
        lm, num_rows = self._lm, len(logits)
        table = logits.new_zeros(num_rows, 2 + len(OUTPUTS), dtype=torch.float32)
        table[:, 0] = logits.max(dim=-1).indices  # exact up to 2 ** 24
        totals, features = self._before[:num_rows], self._before.new_empty(num_rows, 0)
        if lm.head is not None:
            newest = torch.cat([states[layer][0] for layer in lm.head.config.layers], dim=-1).float()
            totals = totals + newest
            features = torch.cat([newest, totals / lengths[:, None]], dim=-1)
            table[:, 1] = lm.head.response(features)
        if lm.cls is not None:
            table[:, 2:] = lm.cls(states[-1][0])
        self._found[num_rows] = totals, features, table

    def said(self, size: int, num_rows: int) -> Said:
        """Return what was said in the newest pass of `size` rows, of the first of them; later passes leave it alone."""
        totals, features, table = (some[:num_rows] for some in self._found[size])
        on_cpu = torch.empty(table.shape, pin_memory=table.is_cuda)
        return Said(totals.clone(), features.clone(), on_cpu.copy_(table, non_blocking=True))
