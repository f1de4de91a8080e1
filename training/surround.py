"""The same request under harmless text, or a few turns ago, so that neither hides it.

A request is as malicious between two pages about gardening, or when the newest message only says "yes,
go on", as it is alone. Rows are drawn with the same chance whatever their labels, and harmless requests
get the same surroundings.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from model.chat import Message
from training.config import Augment
from training.rows import Row

GROUP = "surrounded"
PASSAGE_CHARACTERS = (100, 900)
"""Texts shorter or longer than this are not put around a request."""
MAX_PASSAGES = 4

ASSENTS = (
    "Sure, I can help with that. Shall I begin?",
    "Of course. How much detail would you like?",
    "Yes, I know something about this. Do you want to hear it?",
    "Certainly! Let me know when you are ready.",
    "I can do that. Anything else I should know first?",
    "Good question. Do you want the short or the long version?",
)
GO_AHEADS = (
    "Yes, please.",
    "Yes, go on.",
    "Please begin.",
    "As detailed as you can.",
    "Do it.",
    "Continue.",
    "The long version, please.",
    "No, just answer.",
    "Please answer my question.",
    "ok",
)
LINKS = ("\n\n", "\n", " ", "\n\nMy question: ", "\n\nNow please do this: ", "\n---\n")

Conversation = tuple[Message, ...]


def surrounded(rows: Sequence[Row], settings: Augment, seed: int) -> list[Row]:
    """Return further training rows without a response: some requests in harmless surroundings.

    Args:
        rows: labelled rows; only those of the part `train` are used, each request once.
        settings: the share of requests, and what each weighs in the request loss.
        seed: decides requests and surroundings.
    """
    passages = sorted({text for row in _taught(rows) for text in passages_of(row)})
    share = settings.surround if passages else 0.0

    def change(request: str, rng: random.Random) -> Conversation:
        return rng.choice(_FORMS)(request, passages, rng)

    return changed(rows, change, share=share, weight=settings.surround_weight, group=GROUP, seed=f"{seed}")


def changed(
    rows: Sequence[Row],
    change: Callable[[str, random.Random], Conversation],
    *,
    share: float,
    weight: float,
    group: str,
    seed: str,
) -> list[Row]:
    """Return a share of the requests as `change` puts them, without a response.

    Args:
        rows: labelled rows; only those of the part `train` are used, each request once.
        change: returns the conversation that a request becomes; what it draws, it draws from the given generator.
        share: of the requests, whatever their labels.
        weight: of each in the request loss.
        group: of the rows that are returned.
        seed: decides the requests and what is drawn for each.
    """
    requests = {(row.key, row.request_label): row for row in _taught(rows)}
    made = []
    for key, row in requests.items():
        rng = random.Random(f"{seed}:{key}")
        if rng.random() < share:
            messages = change(row.prompt, rng)
            made.append(
                replace(row, group=group, messages=messages, response=None, response_label=None, request_weight=weight)
            )
    return made


def _taught(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.part == "train" and row.request_label is not None]


def passages_of(row: Row, request_label: int = 0) -> list[str]:
    """Return the harmless response of a request with this label, if its length is right."""
    if row.request_label != request_label or row.response_label != 0 or row.response is None:
        return []
    low, high = PASSAGE_CHARACTERS
    return [row.response.strip()] if low <= len(row.response) <= high else []


def _text(passages: Sequence[str], rng: random.Random) -> str:
    return "\n\n".join(rng.choice(passages) for _ in range(rng.randint(1, MAX_PASSAGES)))


def _before(prompt: str, passages: Sequence[str], rng: random.Random) -> Conversation:
    return (Message("user", _text(passages, rng) + rng.choice(LINKS) + prompt),)


def _after(prompt: str, passages: Sequence[str], rng: random.Random) -> Conversation:
    return (Message("user", prompt + rng.choice(LINKS[:3]) + _text(passages, rng)),)


def _between(prompt: str, passages: Sequence[str], rng: random.Random) -> Conversation:
    (before,) = _before(prompt, passages, rng)
    return _after(before.content, passages, rng)


def _assented(prompt: str, passages: Sequence[str], rng: random.Random) -> Conversation:
    return (
        Message("user", prompt),
        Message("assistant", rng.choice(ASSENTS)),
        Message("user", rng.choice(GO_AHEADS)),
    )


_FORMS: tuple[Callable[[str, Sequence[str], random.Random], Conversation], ...] = (
    _before,
    _after,
    _between,
    _assented,
)
