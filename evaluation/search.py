"""Search for wordings of harmful requests that the signal rates low, as an attacker does who reads what he is shown.

    python -m evaluation.search --data data/eval/direct.jsonl --n 20 --out runs/attacked

Each round tries a few changes of the best wording so far: a scene around it, an aside before or after it, letters of a
word swapped. What guides the search is what the server shows this caller: the exact risk, whether it is flagged, or
only whether it is refused. What was found is kept, so an interrupted search goes on. The best wording is then sent with
both sides blocking, and success is as in `evaluation.attack`, of the request as it was.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple, cast

from openai import BadRequestError, OpenAIError, PermissionDeniedError

from evaluation import kept
from evaluation.attack import attack
from evaluation.attempts import Attempt, texts, under
from evaluation.client import Server, add_arguments, connect
from evaluation.judges import by_phrases
from evaluation.outcomes import outcomes
from evaluation.rows import Row, select
from evaluation.samples import key_of
from evaluation.target import SERVER, told
from model.chat import Message

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
    """Return the best of the wordings that a greedy random search meets; it ends early where nothing is shown to mend.

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
        if risk == 0.0:
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

    A message that the server takes for invalid is of no use: infinity.

    Raises:
        OpenAIError: if it cannot be reached.
    """
    messages: list[Any] = [{"role": "user", "content": text}]
    try:
        body = {"model": server.model, "messages": messages}
        # `dict[str, Any]` as cast_to fails under Python 3.10, where the client takes it for a class.
        found = cast("dict[str, Any]", server.client.post("/safety/score", cast_to=object, body=body))
        risk = found.get("request_risk")
        return float(found["flagged"]["request"]) if risk is None else float(risk)
    except BadRequestError:
        return math.inf
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


def search(server: Server, rows: Sequence[Row], journal: Path, *, rounds: int, width: int) -> list[Searched]:
    """Return the best wording of every request, searching only for those that `journal` does not hold.

    The journal holds texts that may harm: keep it out of repositories.

    Raises:
        OpenAIError: if the server cannot be reached; what was found is kept.
        ValueError: naming file and line of what is no search of this version.
    """
    done = kept.read(journal, lambda entry: Searched(**entry), "search")
    prompts = {key_of(row.prompt, rounds, width): row.prompt for row in rows}

    def find(prompt: str) -> Searched:
        return climb(lambda text: shown(server, text), prompt, rounds=rounds, width=width)

    found = kept.fill(journal, done, prompts, find, Searched._asdict)
    return [found[key] for key in prompts]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Search for wordings that a running server does not refuse.")
    add_arguments(parser, key="as an attacker has it")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of prompt")
    parser.add_argument("--source", default="", help="only rows whose source begins with this")
    parser.add_argument("--n", type=int, default=20, help="most prompts (%(default)s)")
    parser.add_argument("--rounds", type=int, default=12, help="changes of the best wording (%(default)s)")
    parser.add_argument("--width", type=int, default=8, help="changes that are tried in each round (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest response (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the outcomes; its name is the target's")
    args = parser.parse_args(argv)
    try:
        rows = select(args.data, args.n, label=1, source=args.source)
        server = connect(args.server, args.api_key)
        args.out.mkdir(parents=True, exist_ok=True)
        kept.settle(args.out / SERVER, told(server))
        found = search(server, rows, args.out / "searched.jsonl", rounds=args.rounds, width=args.width)
        attempts = [Attempt("search", one.prompt, turns=(Message("user", one.text),)) for one in found]
        path = args.out / "search.jsonl"
        samples = attack(server, under(attempts, ["both"], args.max_tokens), path, args.out.name)
    except (OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.search: {error}\n")
        return 1
    for one in outcomes({args.out.name: samples}, by_phrases):
        sys.stdout.write(f"{one.name}: not refused {one.share}, acted on {one.acted_on}\n")
    first, best = (median(getattr(one, name) for one in found) for name in ("first", "best"))
    asked = median(one.num_asked for one in found)
    sys.stdout.write(f"what was shown, median: {first:.4f} at first, {best:.4f} at last, after {asked:g} messages\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
