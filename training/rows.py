"""One labelled conversation: the row that every data source becomes."""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from model.chat import Message

Part = Literal["train", "validation", "calibration"]

_SOURCE = re.compile(r"(?P<name>.+?)\s*\((?P<licence>[^()]+)\)")
_PERMISSIVE = re.compile(r"MIT|Apache-\d.*|CC-BY-\d.*")


@dataclass(frozen=True)
class Row:
    """A request, perhaps with its response, and what is known of both. A label is 1 for harm, 0, or None."""

    group: str
    """Name of its source in the recipe; what reports count by."""
    source: str
    licence: str
    messages: tuple[Message, ...]
    response: str | None
    request_label: int | None
    response_label: int | None
    request_weight: float = 1.0
    response_weight: float = 1.0
    opening_tokens: int = 0
    """First tokens of the response of which its label does not speak."""
    part: Part = "train"

    @property
    def prompt(self) -> str:
        """The newest user message."""
        return self.messages[-1].content

    @property
    def key(self) -> str:
        """SHA-256 of the prompt's letters, or of the response's where there is no prompt.

        Rows of equal key are one prompt and never stand in two parts.
        """
        return key_of(self.prompt or self.response or "")

    @property
    def has_label(self) -> bool:
        """Whether there is anything to learn from it."""
        return self.request_label is not None or self.response_label is not None


def key_of(text: str) -> str:
    """Return the SHA-256 of a text's letters, or of the text where it has none."""
    letters = "".join(filter(str.isalpha, text.casefold()))
    return hashlib.sha256((letters or text).encode()).hexdigest()


def is_validation(key: str, seed: int, share: float) -> bool:
    """Tell whether a prompt is among the share that nothing is trained on; the seed and its key alone decide."""
    digest = hashlib.sha256("\x00".join((str(seed), "part", key)).encode()).hexdigest()
    return int(digest[:8], 16) / 2**32 < share


def split_source(text: str) -> tuple[str, str] | None:
    """Return name and licence of a `source` field such as `ToxicChat (CC-BY-NC-4.0)`, or None."""
    found = _SOURCE.fullmatch(text)
    return (found["name"], found["licence"]) if found else None


def is_permissive(licence: str) -> bool:
    """Tell whether a licence is MIT, Apache or CC-BY without further conditions."""
    return _PERMISSIVE.fullmatch(licence) is not None


def licence_of_weights(licences: set[str]) -> str | None:
    """Return the licence that rows under `licences` leave to the weights; None where that is not ours to say.

    One non-commercial row makes the weights non-commercial and share-alike.
    """
    if any("-NC" in licence for licence in licences):
        return "CC-BY-NC-SA-4.0"
    return "Apache-2.0" if all(map(is_permissive, licences)) else None
