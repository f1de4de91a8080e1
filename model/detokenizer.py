"""Token ids to text, one at a time, never half a character."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6
"""Tokens decoded before the new one, so that word borders come out as in one go."""


class Detokenizer:
    """Turns a growing list of ids into text; the work per token grows only with what is not yet a whole character.

    Args:
        tokenizer: the model's tokenizer.
        context: ids before the text, which decide whether it begins with a space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-CONTEXT_TOKENS:])
        self._prefix = 0  # decoding starts here
        self._read = len(self._ids)  # everything before has been returned as text

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        before, after = self._decode(self._read), self._decode(len(self._ids))
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._prefix = self._read  # a border between characters: half of one in front would spoil what follows
        self._read = len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """Return what an incomplete character at the end decodes to."""
        before, after = self._decode(self._read), self._decode(len(self._ids))
        self._read = len(self._ids)
        return after[len(before) :]

    def _decode(self, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._prefix : end], skip_special_tokens=True))
