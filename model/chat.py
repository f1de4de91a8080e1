"""Messages to token ids: the request, and apart from it a prefilled assistant message."""

import contextlib
import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError
from transformers import AddedToken, PreTrainedTokenizerBase

from model.errors import TemplateError

FALLBACK_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""For base models, which bring no chat template of their own."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a conversation, split where the response begins."""

    request: tuple[int, ...]
    """Everything that the client supplied, ending with the template's opening of the answer."""
    prefill: tuple[int, ...] = ()
    """A prefilled assistant message: the first tokens of the response."""
    query_start: int = 0
    """Where in `request` the query begins: the newest message of the user, and all after it."""
    content: tuple[bool, ...] = ()
    """For every token of `request`, whether it is the client's text; empty where nobody asked, and all counts as it."""

    def __post_init__(self) -> None:
        if not 0 <= self.query_start < max(1, len(self.request)):
            raise ValueError(f"the query of {len(self.request)} tokens cannot begin at {self.query_start}")
        if self.content and len(self.content) != len(self.request):
            raise ValueError(f"content must speak of {len(self.request)} request tokens, got {len(self.content)}")


class ChatTemplate:
    """A tokenizer's chat template, or a plain one where the tokenizer has none.

    Args:
        tokenizer: brings the template.
        marks_content: say of every request token whether it is the client's text, as a `[CLS]` signal asks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, marks_content: bool = False) -> None:
        self._tokenizer = tokenizer
        self._marks_content = marks_content
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several named ones
            template = template.get("default")
        self.source: str = template if isinstance(template, str) and template else FALLBACK_TEMPLATE
        made = self._made()
        self.takes_system = made.get(("system", "user")) not in (None, made.get(("user",)))
        self._control_tokens = self._find_control_tokens(made)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the template's source."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def encode(self, messages: Sequence[Message], *, continue_final: bool = False) -> EncodedPrompt:
        """Return the ids of `messages`.

        Args:
            messages: the conversation, at least one message.
            continue_final: the last message, an assistant's, is a prefill that the model continues.

        Raises:
            TemplateError: if the template refuses the messages, they hold a control token or are not
                valid Unicode, or `continue_final` has no assistant message to continue.
        """
        if not messages:
            raise TemplateError("messages must hold at least one message")
        for message in messages:
            self._refuse_control_tokens(message.content)
        asked = messages[:-1] if continue_final else messages
        if continue_final and messages[-1].role != "assistant":
            raise TemplateError(
                f"only an assistant message can be continued, the last one has role {messages[-1].role!r}"
            )
        if not asked:
            raise TemplateError("a prefilled assistant message needs a message before it")
        rendered = self._render(asked)
        request = self._ids(rendered)
        prefill: tuple[int, ...] = ()
        if continue_final:
            whole = self._ids(rendered + messages[-1].content)
            is_clean = whole[: len(request)] == request  # or the border would merge: keep it
            prefill = whole[len(request) :] if is_clean else self._ids(messages[-1].content)
        content = self._content(asked, rendered) if self._marks_content else ()
        return EncodedPrompt(request, prefill, self._query_start(asked, request), content)

    def end_of_turn(self, eos_ids: Collection[int]) -> int | None:
        """Return which of the tokens that end a response the template puts after one; None if it puts none of them."""
        mark = "0b1c"
        try:
            after = self._render([Message("user", "a"), Message("assistant", mark)]).partition(mark)[2]
        except TemplateError:
            return None
        return next((token for token in self._ids(after) if token in eos_ids), None)

    def _content(self, messages: Sequence[Message], rendered: str) -> tuple[bool, ...]:
        """Return, for every token of `rendered`, whether it is the client's text.

        Rule R4 of Li & Kim 2025 (arXiv 2505.17072) leaves out all others: markers, and what the template adds by
        itself. A token that holds characters of both counts as text. Where the template changes a text so that its
        place cannot be told, every token counts as text.
        """
        encoded = self._tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=self._tokenizer.is_fast)
        spans = self._text_spans(messages, rendered) if self._tokenizer.is_fast else None
        if spans is None:
            return (True,) * len(encoded["input_ids"])
        return tuple(
            any(start < end_of_text and start_of_text < end for start_of_text, end_of_text in spans)
            for start, end in encoded["offset_mapping"]
        )

    def _text_spans(self, messages: Sequence[Message], rendered: str) -> list[tuple[int, int]] | None:
        """Return where each message's text stands in `rendered`, in characters; None if that cannot be told."""
        marks = [f"\x02{number}\x03" for number in range(len(messages))]
        marked = self._render([Message(message.role, mark) for message, mark in zip(messages, marks, strict=True)])
        pieces = re.split("\x02[0-9]+\x03", marked)
        if re.findall("\x02[0-9]+\x03", marked) != marks:
            return None
        for texts in ([message.content for message in messages], [message.content.strip() for message in messages]):
            if rendered == pieces[0] + "".join(text + piece for text, piece in zip(texts, pieces[1:], strict=True)):
                place, spans = len(pieces[0]), []
                for text, piece in zip(texts, pieces[1:], strict=True):
                    spans.append((place, place + len(text)))
                    place += len(text) + len(piece)
                return spans
        return None

    def _query_start(self, messages: Sequence[Message], request: tuple[int, ...]) -> int:
        """Return the number of tokens of `request` before the query.

        It begins with the newest message of the user, or the first of several in a row; where there is none, with
        the newest that is no assistant's. So nothing that a client puts after its question hides it.

        The tokens before it are those that stay when another text stands in its place: the text itself may occur
        elsewhere, in the template too. A blank text has no place of its own; then the whole request is the query.
        """
        roles = [message.role for message in messages]
        asked = [i for i, role in enumerate(roles) if role == "user"]
        first = (asked or [i for i, role in enumerate(roles) if role != "assistant"] or [0])[-1]
        while first > 0 and messages[first - 1].role == messages[first].role:
            first -= 1
        text = messages[first].content.strip()
        if not text:
            return 0
        other = Message(messages[first].role, "b" if text[0] in "aA" else "a")
        rendered = self._render((*messages[:first], other, *messages[first + 1 :]))
        pairs = zip(request, self._ids(rendered), strict=False)
        start = next((place for place, (one, another) in enumerate(pairs) if one != another), len(request))
        return start if start < len(request) else 0  # the template left the text out

    def _made(self) -> dict[tuple[str, ...], str]:
        """Return what the template makes of some conversations, by their roles; without those that it does not know."""
        made: dict[tuple[str, ...], str] = {}
        for roles in (("user",), ("user", "assistant", "user"), ("system", "user")):
            with contextlib.suppress(TemplateError):
                made[roles] = self._render([Message(role, "a") for role in roles])
        return made

    def _find_control_tokens(self, made: Mapping[tuple[str, ...], str]) -> list[str]:
        """Return the tokens that shape a conversation: the tokenizer's named ones, and the template's.

        The template's are the special ones that stand in it or in what it makes, and of the others those that more
        turns bring more of, for some models do not call the marks of a turn special. Others again, such as the
        `<filename>` of a model for code, are ordinary words to a client. Not found is the mark of a system message, if
        it is not special and the template adds such a message of its own.
        """
        once = made.get(("user",), "")
        longer = [made[roles] for roles in made if len(roles) > 1]
        shown = self.source + "".join(made.values())

        def shapes(token: AddedToken) -> bool:
            if token.special:
                return token.content in shown
            is_word = not token.content.strip() or token.content.strip().isalnum()
            return not is_word and any(once.count(token.content) < text.count(token.content) for text in longer)

        added = [token.content for token in self._tokenizer.added_tokens_decoder.values() if shapes(token)]
        return sorted({*self._tokenizer.all_special_tokens, *added} - {""})

    def _refuse_control_tokens(self, content: str) -> None:
        """Refuse text that would become a control token, such as the end of a turn.

        With one a client could close its own turn inside a message, or open a turn of the user inside a
        prefill, where the request risk is not read any more.
        """
        found = next((token for token in self._control_tokens if token in content), None)
        if found is not None:
            raise TemplateError(f"the text of a message must not hold the model's control token {found}")

    def _ids(self, text: str) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        except (TypeError, UnicodeError) as error:
            raise TemplateError("the messages are not valid Unicode: they hold a lone surrogate") from error

    def _render(self, messages: Sequence[Message]) -> str:
        conversation: list[dict[str, Any]] = [{"role": m.role, "content": m.content} for m in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversation, chat_template=self.source, tokenize=False, add_generation_prompt=True
            )
        except (JinjaError, ValueError, TypeError) as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        return str(rendered)
