"""Tokens generated but not yet released, and the text that they become.

A token leaves when the policy says that no decision can withdraw it any more, and its text only
when it cannot turn out to be the beginning of a stop string.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from model.detokenizer import Detokenizer


@dataclass(frozen=True, slots=True)
class ResponseToken:
    """One token of a response, as a client may see it."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    risk: float | None = None
    """Raw response risk at this token; None where it was not assessed."""


class Holdback:
    """The response tokens of one sequence, released in order and never taken back.

    Args:
        tokenizer: the model's tokenizer.
        context: ids before the response.
        stop: strings that end the response; the text before the first one is kept.
        min_tokens: stop strings that end within the text of the first this many tokens are ordinary text, as in vLLM.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: Sequence[int],
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._context = tuple(context)
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(tokenizer, context)
        self._tokens: list[ResponseToken] = []
        self._token_ids: list[int] = []
        self._ends: list[int] = []  # length of the text after each token
        self._text = ""
        self._stop_at: int | None = None
        self._is_cropped = False
        self._sent_tokens = 0
        self._sent_text = 0

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of every token, released or not."""
        return self._token_ids

    @property
    def text(self) -> str:
        """All text, released or not."""
        return self._text

    @property
    def num_released(self) -> int:
        """Tokens that left."""
        return self._sent_tokens

    @property
    def has_stopped(self) -> bool:
        """Whether the text holds a stop string."""
        return self._stop_at is not None

    def push(self, token: ResponseToken) -> None:
        """Append a generated token and look for stop strings, over token borders too."""
        start = len(self._text)
        self._text += self._detokenizer.push(token.token_id)
        self._tokens.append(token)
        self._token_ids.append(token.token_id)
        self._ends.append(len(self._text))
        self._is_cropped = False
        if self._stop_at is None and len(self._tokens) > self._min_tokens:
            found = [at for stop in self._stop if (at := self._text.find(stop, max(0, start - len(stop) + 1))) >= 0]
            self._stop_at = min(found, default=None)

    def set_risk(self, index: int, risk: float) -> None:
        """Note the raw response risk at token `index`, counted from 0."""
        token = self._tokens[index]
        self._tokens[index] = ResponseToken(token.token_id, token.logprob, token.top_logprobs, risk)

    def crop(self, length: int) -> int:
        """Withdraw every token after the first `length` and return how many they were.

        Half a character that this leaves at the end becomes no text unless more tokens complete it.

        Raises:
            ValueError: if one of them has been released.
        """
        if length < self._sent_tokens:
            raise ValueError(f"token {self._sent_tokens} has been released, cannot withdraw down to {length}")
        withdrawn = len(self._tokens) - length
        kept, self._tokens, self._token_ids, self._ends = self._tokens[:length], [], [], []
        self._text, self._stop_at = "", None
        self._detokenizer = Detokenizer(self._tokenizer, self._context)
        for token in kept:
            self.push(token)
        self._is_cropped = withdrawn > 0
        return withdrawn

    def release(self, length: int, *, is_end: bool = False) -> tuple[str, tuple[ResponseToken, ...]]:
        """Return the text and tokens that may leave now, out of the first `length` tokens.

        Args:
            length: tokens that no decision can withdraw any more.
            is_end: nothing follows: text before a stop string leaves whole, and so does an
                incomplete character.
        """
        limit = self._ends[length - 1] if length else 0
        if is_end:
            if self._stop_at is not None:
                limit = min(limit, self._stop_at)
            elif length == len(self._tokens) and not self._is_cropped:
                self._text += self._detokenizer.flush()
                limit = len(self._text)
        else:
            limit -= self._partial_stop(limit)
        text = self._text[self._sent_text : limit]
        first = self._sent_tokens
        last = first
        while last < length and self._leaves(last, limit, is_end=is_end):
            last += 1
        self._sent_tokens = last
        self._sent_text = max(self._sent_text, limit)
        return text, tuple(self._tokens[first:last])

    def _leaves(self, index: int, limit: int, *, is_end: bool) -> bool:
        """Tell whether token `index` leaves with the text up to `limit`."""
        start = self._ends[index - 1] if index else 0
        if is_end and self._stop_at is not None:
            return start < limit
        return is_end or self._ends[index] <= limit

    def _partial_stop(self, limit: int) -> int:
        """Return the length of the longest end of the text before `limit` that may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, limit), 0, -1):
            tail = self._text[limit - size : limit]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
