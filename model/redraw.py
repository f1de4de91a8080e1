"""A refusal with which a response begins, although the request is not malicious: it is drawn again, once.

Weights whose refusals hold deep into a response also refuse what is harmless, nearly always with the first token; the
signal tells requests apart better (docs/adr/0006). Not in the source papers.
"""

from collections.abc import Sequence

from torch import Tensor

OPENING = 6
"""Tokens of the refusal prefix with which a response begins that is taken for a refusal. Of a shorter prefix nothing is
drawn again: answers begin so too."""


class Redraw:
    """Watches the first tokens of one response.

    Args:
        opening: the first `OPENING` tokens of a refusal.
        logits: those that the first token is drawn from, (V,).
    """

    def __init__(self, opening: Sequence[int], logits: Tensor) -> None:
        self.opening = tuple(opening)
        self.logits = logits.clone()  # not a view of all sequences' logits

    def may_come(self, token_ids: Sequence[int]) -> bool:
        """Tell whether a response with these first tokens may become a refusal: none of it may leave."""
        return len(token_ids) < len(self.opening) and tuple(token_ids) == self.opening[: len(token_ids)]

    def is_due(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the response has become a refusal with its newest token."""
        return tuple(token_ids) == self.opening
