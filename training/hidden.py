"""Requests somewhere in harmless text, and where in it they stand: from these the head of the query learns.

Malicious and harmless requests get surroundings in the same way, so that those say nothing of the label.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.chat import ChatTemplate, EncodedPrompt, Message
from training.config import Cut
from training.corpus import sample
from training.rows import Row
from training.surround import LINKS, passages_of

SHORT, LONG = (60, 500), (500, 3000)
"""Characters of what stands on one side of a request."""
SHARES = (0.25, 0.65, 0.1)
"""Of sides with nothing, with short and with long text."""
LONG_REQUEST = 120
"""Harmless requests of so many characters are surroundings too."""
REFUSED = 0.1
"""At most so many refusals among surroundings for each other text."""


class Hidden(NamedTuple):
    """A request between two harmless texts, either of which may be empty."""

    row: Row
    before: str
    after: str

    @property
    def text(self) -> str:
        """The whole message."""
        return self.before + self.row.prompt + self.after


class Placed(NamedTuple):
    """A message in tokens, and where in it the request is."""

    prompt: EncodedPrompt
    inside: Tensor
    """Which tokens of the query are the request's, (T,) bools; to within a token or two, and with the template's last
    tokens where the template does not say which are its own. All of them false where the cut took the request."""


def surroundings(rows: Sequence[Row], seed: int) -> list[str]:
    """Return harmless texts: answers to harmless requests, such requests where they are long, and some refusals.

    A refusal often names what it refuses; who pastes one into a message does not ask for it. Whatever harmless was
    said to a malicious request counts as one.
    """
    long = {row.prompt for row in rows if row.request_label == 0 and len(row.prompt) >= LONG_REQUEST}
    texts = {text for row in rows for text in passages_of(row)} | long
    refused = sample([row for row in rows if passages_of(row, 1)], int(len(texts) * REFUSED), seed)
    return sorted(texts | {text for row in refused for text in passages_of(row, 1)})


def hide(rows: Sequence[Row], texts: Sequence[str], seed: int) -> list[Hidden]:
    """Return each request in surroundings of its own, which the seed and the request decide."""
    found = []
    for row in rows:
        rng = random.Random(f"{seed}:{row.key}")
        before, after = _stretch(texts, rng), _stretch(texts, rng)
        found.append(
            Hidden(row, before + rng.choice(LINKS) if before else "", rng.choice(LINKS[:3]) + after if after else "")
        )
    return found


def place(hidden: Hidden, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, cut: Cut) -> Placed:
    """Return the tokens of a message, the newest of them where it is too long.

    Args:
        hidden: the request and what is around it.
        tokenizer: the model's.
        template: its template; one that marks content.
        cut: most tokens of a request.

    Raises:
        TemplateError: if the template refuses the message.
    """
    whole = template.encode([*hidden.row.messages[:-1], Message("user", hidden.text)])
    text = [index for index, is_text in enumerate(whole.content) if is_text and index >= whole.query_start]
    num_before, num_after = (
        len(tokenizer.encode(side, add_special_tokens=False)) for side in (hidden.before, hidden.after)
    )
    inside = torch.zeros(len(whole.request), dtype=torch.bool)
    if text:
        inside[text[0] + num_before : text[-1] + 1 - num_after] = True
    first = max(0, len(whole.request) - cut.request_tokens)
    start = max(whole.query_start, first)
    prompt = EncodedPrompt(whole.request[first:], query_start=start - first)
    return Placed(prompt, inside[start:])


def _stretch(texts: Sequence[str], rng: random.Random) -> str:
    """Return harmless text of a drawn length, cut between two words; sometimes none."""
    (longest,) = rng.choices([(0, 0), SHORT, LONG], SHARES)
    wanted, text = rng.randint(*longest), ""
    while len(text) < wanted:
        text += rng.choice(texts) + "\n\n"
    return text[:wanted].rpartition(" ")[0]
