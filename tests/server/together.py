"""Mixed requests that run together, and what each of them says."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model.chat import Message
from model.config import ClsConfig, Thresholds, TokenHeadConfig
from model.events import Finish, Release
from model.generation import Generation
from model.guarded_lm import GuardedLM
from model.passes import Pass
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import SamplingParams
from server.engine.runner import PagedRunner

CLS = ClsConfig(windows=(3, 4, 3), schedule="annealed")
HEAD = TokenHeadConfig((1, -1), 32, 0, reads_query=True)
SIGNALS = {
    "token": {"token_head": HEAD},
    "cls": {"token_head": None, "cls": CLS},
    "both": {"token_head": HEAD, "cls": CLS},
}
NEVER, OFTEN = Thresholds(block=0.999, flag=0.5), Thresholds(block=0.52, flag=0.5)


def with_signals(*families: str) -> list[Any]:
    """Return each family with each signal; what has one kind of signal alone is slow but for one family."""
    return [
        pytest.param(family, signal, marks=[] if signal == "both" or family == "llama" else [pytest.mark.slow])
        for family in families
        for signal in SIGNALS
    ]


SOME = with_signals("llama", "mistral", "gpt_neox")
"""Families of unlike attention: of all tokens, of a window, and with rotary angles for a part of each head."""


def requests(lm: GuardedLM, count: int, seed: int = 0) -> list[GenerationRequest]:
    """Return mixed requests: long and short, prefilled, greedy and sampled with any parameters, under any policy."""
    drawn = random.Random(seed)
    found = []
    for number in range(count):
        words = ["Tell me more."] if number % 3 else ["You are terse and kind to all.", "What is it?"]
        said = [Message("system", words[0])] if len(words) > 1 else []
        said += [Message("user", words[-1] + " And so on." * drawn.randint(0, 4) + str(number % 5))]
        prefill = number % 4 == 1
        if prefill:
            said.append(Message("assistant", "Well, " * drawn.randint(1, 4)))
        modes = {side: drawn.choice(list(Mode)) for side in ("input", "output")}
        prompt, most = lm.chat.encode(said, continue_final=prefill), drawn.randint(1, 40)
        stop = ("e", "th") if number % 6 == 5 else ()
        sampling = parameters(lm, drawn, number, most)
        found.append(GenerationRequest(prompt, most, sampling, stop, **modes, choice=number % 3))
    return found


def parameters(lm: GuardedLM, drawn: random.Random, number: int, most: int) -> SamplingParams:
    """Return sampling parameters of a request for `most` tokens; a third of them are the defaults."""
    given: dict[str, Any] = {"temperature": drawn.choice([0.0, 0.8]), "seed": number}
    given["top_logprobs"] = 2 if number % 2 else None
    if number % 3 == 0:
        return SamplingParams(**given)
    others = {
        "top_p": drawn.choice([0.5, 0.95]),
        "top_k": drawn.choice([2, 20]),
        "min_p": drawn.choice([0.05, 0.3]),
        "presence_penalty": drawn.choice([-1.0, 1.5]),
        "frequency_penalty": drawn.choice([-0.5, 1.0]),
        "repetition_penalty": drawn.choice([0.8, 1.3]),
        "logit_bias": {drawn.randrange(3, lm.vocab_size): drawn.choice([-100.0, 5.0])},
        "min_tokens": drawn.randint(1, most),
        "ignore_eos": True,
    }
    return SamplingParams(**given, **{name: others[name] for name in drawn.sample(sorted(others), 4)})


def together(
    lm: GuardedLM,
    asked: list[GenerationRequest],
    runner: PagedRunner | None = None,
    seed: int = 0,
    *,
    evicts: bool = False,
    leaves: bool = False,
):
    """Return the events of each request, some of them in each pass; of those that leave, events without an end.

    Args:
        lm: the model.
        asked: the requests.
        runner: runs the passes; one with 400 pages unless given.
        seed: of what runs together.
        evicts: in each step two sequences lose their pages.
        leaves: one in eight requests is given up in the middle.
    """
    runner, drawn = runner or PagedRunner(lm, 400), random.Random(seed)
    events = [[] for _ in asked]
    seats = {}
    steps = [Generation(lm, request, lm.schedule).run() for request in asked]
    waiting: dict[int, Pass] = {}

    def go_on(number: int, step: Callable[[], Pass | Release]) -> None:
        try:
            item = step()
            while not isinstance(item, Pass):
                events[number].append(item)
                item = next(steps[number])
            waiting[number] = item
        except StopIteration as end:
            events[number].append(end.value)
            runner.close(seats[number])

    arriving = list(enumerate(asked))
    while waiting or arriving:
        for number, one in [arriving.pop(0) for _ in range(min(len(arriving), drawn.randint(1, 6)))]:
            seats[number] = runner.open(one.prompt, watches_request=one.input is not Mode.OFF)
            go_on(number, lambda number=number: next(steps[number]))
        chosen = drawn.sample(sorted(waiting), drawn.randint(1, len(waiting)))
        for number in drawn.sample(sorted(waiting), 2) if evicts and len(waiting) > 2 else ():
            runner.evict(seats[number])
        for number in [number for number in chosen if leaves and number % 8 == 7 and len(events[number]) > 3]:
            steps[number].close()
            runner.close(seats[number])
            del waiting[number]
            chosen.remove(number)
        passes = {number: runner.next_pass(seats[number], waiting[number]) for number in chosen}
        passed = runner.run([(seats[number], passes[number]) for number in chosen])
        for number, found in zip(chosen, passed, strict=True):
            if passes[number] is waiting[number]:
                del waiting[number]
                go_on(number, lambda number=number, found=found: steps[number].send(found))
    assert runner.pages.num_available == runner.pages.num_pages
    return events


def told(events: list[Release | Finish]):
    """Return what a client sees of events, and the risks."""
    *releases, finish = events
    tokens = [token for release in releases for token in release.tokens]
    exact = (
        "".join(release.text for release in releases),
        [(token.token_id, [number for number, _ in token.top_logprobs]) for token in tokens],
        replace(finish, request_risk=None, response_risk=None),
    )
    near = [finish.request_risk, finish.response_risk, *(token.risk for token in tokens)]
    near += [value for token in tokens for value in (token.logprob, *(of_one for _, of_one in token.top_logprobs))]
    return exact, [-1.0 if value is None else value for value in near]
