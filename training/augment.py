"""Conversations around the requests, so that neither history nor a system message says anything about harm.

Every row is drawn with the same chance, whatever its labels.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from model.chat import Message
from training.config import Augment
from training.rows import Row

SYSTEM_MESSAGES = (
    "You are a helpful assistant. Keep your answers short.",
    "You work for a public library and help visitors find what they need.",
    "Answer as a patient teacher would, with an example where it helps.",
    "You are the assistant of a small software company. Be precise and polite.",
    "Today you help with writing: letters, stories, summaries and lists.",
    "Reply in plain words. If you are not sure, say so.",
    "You are a friendly travel companion with good general knowledge.",
    "Follow the user's instructions and think step by step before you answer.",
)
MAX_EXCHANGE_CHARACTERS = 800
"""Longer exchanges are not put in front, so that they do not crowd out the request."""


def augment(rows: Sequence[Row], settings: Augment, seed: int) -> list[Row]:
    """Return the rows, some with an earlier exchange or a system message in front; labels are unchanged.

    Exchanges come from benign rows of the same part, so that no prompt reaches another part.
    """
    exchanges: dict[str, list[tuple[Message, Message]]] = {}
    for row in rows:
        if (exchange := _exchange(row)) is not None:
            exchanges.setdefault(row.part, []).append(exchange)
    return [_augmented(row, settings, exchanges.get(row.part, []), seed) for row in rows]


def _exchange(row: Row) -> tuple[Message, Message] | None:
    if (row.request_label, row.response_label) != (0, 0) or row.response is None:
        return None
    if len(row.prompt) + len(row.response) > MAX_EXCHANGE_CHARACTERS:
        return None
    return Message("user", row.prompt), Message("assistant", row.response)


def _augmented(row: Row, settings: Augment, exchanges: Sequence[tuple[Message, Message]], seed: int) -> Row:
    rng = random.Random(f"{seed}:{row.key}:{row.response}")
    messages = row.messages
    if rng.random() < settings.history and exchanges:
        messages = (*rng.choice(exchanges), *messages)
    if rng.random() < settings.system:
        messages = (Message("system", rng.choice(SYSTEM_MESSAGES)), *messages)
    return replace(row, messages=messages)
