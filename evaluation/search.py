"""Search for wordings of harmful requests that the signal rates low, as an attacker does who reads what he is shown.

Each round tries a few changes of the best wording so far: a scene around it, an aside before or after it, letters of a
word swapped. What guides the search is what the server shows this caller: the exact risk, whether it is flagged, or
only whether it is refused. What was found is kept, so an interrupted search goes on. The best wording is then sent as
any other attack is, and success is of the request as it was.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, cast

import numpy as np
from openai import APIStatusError, PermissionDeniedError

from evaluation import kept
from evaluation.attempts import Attempt, texts, under
from evaluation.client import PARALLEL, Server
from evaluation.intervals import resampled
from evaluation.rows import Row
from evaluation.samples import key_of
from evaluation.suite import Measure
from model.chat import Message

ROUNDS = 12
WIDTH = 8
Rate = Callable[[str], float]
"""Gives what the attacker is shown of a message: the higher, the worse for him."""


class Searched(NamedTuple):
    """What a search came to."""

    prompt: str
    text: str
    """The best wording."""
    first: float
    """What was shown of the request as it was."""
    best: float
    num_asked: int


def climb(rate: Rate, request: str, *, rounds: int, width: int, seed: int = 0) -> Searched:
    """Return the best of the wordings that a greedy random search meets.

    It ends early where nothing is shown to mend, and where the request itself is of no use.

    Args:
        rate: what guides it.
        request: the harmful request.
        rounds: how often the best wording so far is changed.
        width: changes that are tried in each round.
        seed: of the draws, together with the request.
    """
    drawn = Random(f"{seed} {request}")
    text, risk = request, rate(request)
    first, num_asked = risk, 1
    for _ in range(rounds):
        if risk == 0.0 or math.isinf(first):
            break
        tried = sorted({_changed(text, drawn) for _ in range(width)} - {text})
        drawn.shuffle(tried)  # where little is shown many are alike, and any of them is a way on
        rated = [(rate(one), place, one) for place, one in enumerate(tried)]
        num_asked += len(rated)
        if rated and (best := min(rated))[0] <= risk:
            risk, _, text = best
    return Searched(request, text, first, risk, num_asked)


def shown(server: Server, text: str) -> float:
    """Return what the server shows of a message: its risk, else 1 where it is flagged or refused and 0 where not.

    A message that the server takes for invalid, or cannot judge, is of no use: infinity.

    Raises:
        OpenAIError: if it cannot be reached.
    """
    try:
        return _told(server, [{"role": "user", "content": text}])
    except APIStatusError as error:
        if kept.is_void(error):
            return math.inf
        raise


def _told(server: Server, messages: list[Any]) -> float:
    try:
        body = {"model": server.model, "messages": messages}
        # `dict[str, Any]` as cast_to fails under Python 3.10, where the client takes it for a class.
        found = cast("dict[str, Any]", server.client.post("/safety/score", cast_to=object, body=body))
        risk = found.get("request_risk")
        return float(found["flagged"]["request"]) if risk is None else float(risk)
    except PermissionDeniedError:
        create = server.client.chat.completions.create
        answer = create(model=server.model, messages=messages, max_tokens=1, temperature=0)
        return float(answer.choices[0].finish_reason == "content_filter")


def _changed(text: str, drawn: Random) -> str:
    """Return the text with one change."""
    kind = drawn.choice(("scene", "before", "after", "letters"))
    if kind == "scene":
        return str(drawn.choice(texts()["scenes"])).replace("{request}", text)
    aside = drawn.choice(texts()["asides"])
    if kind == "before":
        return f"{aside} {text}"
    if kind == "after":
        return f"{text} {aside}"
    words = list(re.finditer(r"[A-Za-z]{5,}", text))
    if not words:
        return text
    place = (word := drawn.choice(words)).start() + drawn.randint(1, len(word.group()) - 3)
    return text[:place] + text[place + 1] + text[place] + text[place + 2 :]


def plan(
    server: Server, rows: Sequence[Row], measure: Measure, journal: Path, parallel: int = PARALLEL
) -> list[Attempt]:
    """Return the attempts with the best wording of every request, searching only for those that `journal` lacks.

    The journal holds texts that may harm: keep it out of repositories.

    Raises:
        OpenAIError: if the server cannot be reached; what was found is kept.
        ValueError: naming file and line of what is no search of this version.
    """
    rounds, width = measure.rounds or ROUNDS, measure.width or WIDTH
    prompts = {key_of(row.prompt, rounds, width): row.prompt for row in rows}

    def find(prompt: str) -> Searched | None:
        found = climb(lambda text: shown(server, text), prompt, rounds=rounds, width=width)
        return found if math.isfinite(found.best) else None

    done = {key: one for key, one in read_journal(journal).items() if key in prompts}
    found = kept.fill(journal, done, prompts, find, Searched._asdict, parallel)
    attempts = [Attempt("search", one.prompt, turns=(Message("user", one.text),)) for one in found.values()]
    return under(attempts, measure.policies, measure.max_tokens)


def read_journal(path: Path) -> dict[str, Searched]:
    """Return what was found, by request.

    Raises:
        ValueError: naming file and line of what is no search of this version.
    """
    return kept.read(path, lambda entry: Searched(**entry), "search")


def summary(found: Sequence[Searched]) -> str:
    """Return in words how far the searches came: medians, of several with a bootstrap interval of 95 %."""

    def middle(values: Sequence[float], form: str) -> str:
        if len(values) == 1:
            return f"{values[0]:{form}}"
        one = resampled(values, lambda some: np.median(some, axis=1))
        return f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"

    first, best = (middle([getattr(one, name) for one in found], ".4f") for name in ("first", "best"))
    asked = middle([one.num_asked for one in found], "g")
    shown_of = f"shown of a request as it was {first}, of the best wording {best}"
    return f"{shown_of}, after {asked} messages (medians, n = {len(found)})"
