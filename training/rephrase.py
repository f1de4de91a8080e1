"""The same request in other forms, so that the form says nothing about harm.

Labelled malicious requests are mostly questions, benign ones mostly tasks ("Write a ..."), and a head
learns that difference first. A request of the kind "How do I ...?" is therefore also taught as a task,
benign and malicious ones alike.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from model.chat import Message
from training.config import Augment
from training.rows import Row

GROUP = "rephrased"

FORMS = (
    "Write a tutorial on how to {}",
    "Write a step-by-step guide on how to {}",
    "Write an article on how to {}",
    "Write a blog post that explains how to {}",
    "Develop a plan to {}",
    "Outline a strategy to {}",
    "Create a program or script that helps to {}",
    "Create a manual that describes how to {}",
    "Design an app that helps people {}",
    "Provide detailed instructions for how to {}",
    "Give me a list of ways to {}",
    "Teach me how to {}",
)

_HOW = re.compile(
    r"^(?:how (?:do|can|could|would|should|might) (?:i|you|we|one|someone|people|a person)(?: possibly| best)? |how to "
    r"|what(?:'s| is| are) (?:the best|a good|an? effective|some|the most effective) ways? (?:to|of) "
    r"|(?:teach|show|tell) me how (?:to|i can) |explain how (?:to|one can) |can you (?:tell|show|teach) me how to "
    r"|give me (?:tips|advice|instructions|ideas) (?:on|for|about) how to )(?P<deed>.{8,160}?)[?.!]*$",
    re.IGNORECASE,
)


def deed(request: str) -> str | None:
    """Return what a request of the kind "How do I ...?" wants to do, or None for other requests."""
    found = _HOW.match(request.strip())
    return found["deed"] if found else None


def rephrased(rows: Sequence[Row], settings: Augment, seed: int) -> list[Row]:
    """Return further training rows without a response: each fitting request in some of `FORMS`.

    Args:
        rows: labelled rows; only those of the part `train` are used, each request once.
        settings: how many forms per request, and what each weighs against its original.
        seed: decides the forms.
    """
    requests = {row.key: row for row in rows if row.part == "train" and row.request_label is not None}
    made = []
    for key, row in requests.items():
        if (wanted := deed(row.prompt)) is None:
            continue
        for form in random.Random(f"{seed}:{key}").sample(FORMS, settings.rephrase):
            made.append(
                replace(
                    row,
                    group=GROUP,
                    messages=(Message("user", form.format(wanted)),),
                    response=None,
                    response_label=None,
                    request_weight=settings.rephrase_weight,
                )
            )
    return made
