"""One choice's answer as it grows: its text, its refusal, and what is told about its tokens."""

from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from model.events import Release
from model.holdback import ResponseToken
from server.protocol.completion import Logprobs, TokenLogprob, TokenRisk, TopLogprob

REPLACEMENT = "\ufffd"
BEFORE_REFUSAL = "\n\n"
"""Between released text and the refusal that follows it in `content`."""


class Answer:
    """Collects the releases of one choice.

    Args:
        tokenizer: turns token ids into the text of single tokens.
        with_logprobs: report log-probabilities.
        refusal_in_content: a refusal's text is content too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, with_logprobs: bool, refusal_in_content: bool) -> None:
        self._text_of = token_texts(tokenizer)
        self._with_logprobs = with_logprobs
        self._refusal_in_content = refusal_in_content
        self._content = ""
        self._refusal = ""
        self._tokens: list[ResponseToken] = []
        self._untold: tuple[list[ResponseToken], list[ResponseToken]] = ([], [])  # of content, of the refusal

    @property
    def content(self) -> str | None:
        """All text that the client reads as content; None instead of an empty string."""
        return self._content or None

    @property
    def refusal(self) -> str | None:
        """The whole refusal, or None."""
        return self._refusal or None

    def add(self, release: Release) -> str | None:
        """Take in a release; return what it adds to the content, None instead of an empty string."""
        self._tokens += release.tokens
        if self._with_logprobs:
            self._untold[release.is_refusal].extend(release.tokens)
        added = release.text
        if release.is_refusal and added:
            first = not self._refusal
            self._refusal += added
            if not self._refusal_in_content:
                return None
            if first and self._content:
                added = BEFORE_REFUSAL + added
        self._content += added
        return added or None

    def take_logprobs(self) -> Logprobs | None:
        """Return the log-probabilities not yet taken; None if they were not asked for or there are none."""
        content, refusal = self._untold
        self._untold = ([], [])
        if not (content or refusal):
            return None
        return Logprobs(content=self._logprobs(content), refusal=self._logprobs(refusal))

    def trace(self) -> list[TokenRisk]:
        """Return the risk of every released token."""
        return [
            TokenRisk(token_id=token.token_id, token=self._text_of(token.token_id), risk=token.risk)
            for token in self._tokens
        ]

    def _logprobs(self, tokens: Iterable[ResponseToken]) -> list[TokenLogprob] | None:
        found = []
        for token in tokens:
            top = [self._top(token_id, logprob) for token_id, logprob in token.top_logprobs]
            own = self._top(token.token_id, token.logprob if token.logprob is not None else 0.0)
            found.append(TokenLogprob(token=own.token, bytes=own.bytes, logprob=own.logprob, top_logprobs=top))
        return found or None

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._text_of(token_id)
        is_whole = REPLACEMENT not in text
        return TopLogprob(token=text, bytes=list(text.encode()) if is_whole else None, logprob=logprob)


def token_texts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """Return what gives the text of a token inside a text, a replacement character where it is a part of one.

    Some tokenizers leave out the space of a word that begins a text, so it is decoded behind another token.
    """
    before_id = int(tokenizer.encode("a", add_special_tokens=False)[-1])
    before = str(tokenizer.decode([before_id], skip_special_tokens=False))

    def text_of(token_id: int) -> str:
        text = str(tokenizer.decode([before_id, token_id], skip_special_tokens=False))
        if text.startswith(before):
            return text[len(before) :]
        return str(tokenizer.decode([token_id], skip_special_tokens=False))

    return text_of
