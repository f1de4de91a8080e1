"""The same response after a harmless opening, so that the response side learns where a response turns.

Labelled responses are harmful from their first words or not at all, and a head that learned from them alone takes its
time to notice a response that turns. Rows are drawn with the same chance whatever their labels: harmless responses get
the same openings, so that a change of subject says nothing about harm.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from training.config import Augment
from training.rows import Row

GROUP = "onsets"
WORDS = (5, 100)
"""Fewest and most words of an opening; an answer with fewer is used whole."""


def opened(rows: Sequence[Row], settings: Augment, seed: int, *, count: Callable[[str], int]) -> list[Row]:
    """Return further training rows, without a request label: some responses after the opening of another answer.

    The label of a harmful one speaks of what comes after its opening alone, by smoothed risks, the first of which still
    hold much of the opening. One whose opening is longer than what is read of a response teaches nothing.

    Args:
        rows: labelled rows; only those of the part `train` are used. Openings are of harmless responses to benign
            requests, other ones than the response itself; without one there are no further rows.
        settings: `onset` is the share of responses.
        seed: decides responses and openings.
        count: returns the number of tokens of a text.
    """
    labelled = [row for row in rows if row.part == "train" and row.response_label is not None]
    taught = [(row, row.response) for row in labelled if row.response]
    openings = sorted({text for row, text in taught if (row.request_label, row.response_label) == (0, 0)})
    made = []
    for row, text in taught:
        rng = random.Random(f"{seed}:{GROUP}:{row.key}:{text}")
        is_drawn = rng.random() < settings.onset
        if is_drawn and (others := [opening for opening in openings if opening != text]):
            opening = " ".join(rng.choice(others).split()[: rng.randint(*WORDS)])
            made.append(
                replace(
                    row,
                    group=GROUP,
                    response=f"{opening} {text}",
                    request_label=None,
                    opening_tokens=count(opening) if row.response_label else 0,
                )
            )
    return made
