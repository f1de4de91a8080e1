"""The same request in a disguise: in a role, a story or orders about the answer, or with an ending without sense.

Ready attacks put a malicious request into such words. A head that never saw them takes the words, which are mostly
harmless, for the request. Rows are drawn with the same chance whatever their labels, and harmless requests get the same
disguises, so that none of them says anything about harm.
"""

import random
import re
import string
from collections.abc import Sequence
from functools import cache
from typing import Annotated

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from model.chat import Message
from training.config import STRICT, Augment
from training.rows import Row
from training.surround import Conversation, changed
from training.templates import SHIPPED, Texts

GROUP = "disguised"
SENSELESS = 0.25
"""Share of the disguises that end without sense, as a search for an attack ends them; as many end with an order."""
PIECES = (8, 24)
"""Fewest and most pieces of an ending without sense."""
LONGEST_PIECE = 7
SIGNS = string.ascii_letters + string.punctuation


@dataclass(frozen=True, config=STRICT)
class Disguises:
    """The content of `texts/disguises.yaml`."""

    templates: Annotated[tuple[str, ...], Field(min_length=1)]
    endings: Texts


@cache
def shipped() -> Disguises:
    """Return the disguises that come with this release."""
    raw = yaml.safe_load((SHIPPED / "disguises.yaml").read_text(encoding="utf-8"))
    return TypeAdapter(Disguises).validate_python(raw)


def disguised(rows: Sequence[Row], settings: Augment, seed: int) -> list[Row]:
    """Return further training rows without a response: some requests in a disguise.

    Args:
        rows: labelled rows; only those of the part `train` are used, each request once.
        settings: the share of requests, and what each weighs in the request loss.
        seed: decides requests and disguises.
    """

    def change(request: str, rng: random.Random) -> Conversation:
        return (Message("user", disguise(request, rng)),)

    share, weight = settings.disguise, settings.disguise_weight
    return changed(rows, change, share=share, weight=weight, group=GROUP, seed=f"{GROUP}:{seed}")


def disguise(request: str, rng: random.Random) -> str:
    """Return the request in a disguise that `rng` draws: a template, an ending, or both."""
    texts = shipped()
    has_ending = rng.random() < 2 * SENSELESS
    text = request
    if not has_ending or rng.random() < 0.5:
        words = request.split()
        middle = (len(words) + 1) // 2
        parts = {"request": request, "first": " ".join(words[:middle]), "second": " ".join(words[middle:])}
        text = re.sub(r"\{(request|first|second)\}", lambda found: parts[found[1]], rng.choice(texts.templates))
    if has_ending:
        text += " " + (rng.choice(texts.endings) if rng.random() < 0.5 else _nonsense(rng))
    return text


def _nonsense(rng: random.Random) -> str:
    """Return pieces of letters and signs without any sense."""
    return " ".join("".join(rng.choices(SIGNS, k=rng.randint(1, LONGEST_PIECE))) for _ in range(rng.randint(*PIECES)))
