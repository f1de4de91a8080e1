"""Many sequences in one pass: each gets what it gets alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.chat import Message
from model.config import RefusalConfig
from model.events import Finish, Release
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.passes import Pass
from model.policy import Mode
from model.request import GenerationRequest
from model.testing import FAMILIES, tiny_guarded_lm
from server.engine.assessing import assess
from server.engine.kv_cache import Seat
from server.engine.runner import PagedRunner
from tests.server.together import (
    CLS,
    HEAD,
    NEVER,
    OFTEN,
    SIGNALS,
    SOME,
    requests,
    together,
    told,
    with_signals,
)


@pytest.mark.parametrize(("family", "signal"), with_signals(*FAMILIES))
def test_each_sequence_says_what_it_says_alone(family: str, signal: str):
    check_each_sequence(family, signal, is_hard=False)


@pytest.mark.parametrize(("family", "signal"), SOME)
def test_in_small_pieces_and_evicted_in_between_each_says_so_too(family: str, signal: str, monkeypatch):
    for module in ("model.generation", "server.engine.kv_cache"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK", 24)
    check_each_sequence(family, signal, is_hard=True)


def check_each_sequence(family: str, signal: str, *, is_hard: bool) -> None:
    """Compare 16 requests that run together with each of them alone."""
    thresholds = {"request": OFTEN if is_hard else NEVER, "response": OFTEN, "onset": 0.4}
    lm = tiny_guarded_lm(family, **SIGNALS[signal] | thresholds)
    alone = tiny_guarded_lm(family, **SIGNALS[signal] | thresholds)
    asked = requests(lm, 16)
    found = [told(events) for events in together(lm, asked, evicts=is_hard)]
    expected = [told(list(generate(alone, request))) for request in asked]
    assert [exact for exact, _ in found] == [exact for exact, _ in expected]
    for (_, risks), (_, wanted) in zip(found, expected, strict=True):
        assert risks == pytest.approx(wanted, abs=1e-4)
    actions = {exact[2].action for exact, _ in found}
    assert "none" in actions
    assert actions & {"refused", "rolled_back"}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["annealed", "every", "first", "periodic-3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_200_requests_each_says_what_it_says_alone(family: str, schedule: str, monkeypatch):
    for module in ("model.generation", "server.engine.kv_cache"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK", 24)
    thresholds = {"request": OFTEN, "response": OFTEN, "onset": 0.4}
    signal = {"token_head": HEAD if schedule != "first" else None, "cls": replace(CLS, schedule=schedule)}
    lm, alone = (tiny_guarded_lm(family, **signal | thresholds) for _ in range(2))
    cached = []
    opened = PagedRunner.open

    def noted(self: PagedRunner, *args: Any, **how: Any) -> Seat:
        seat = opened(self, *args, **how)
        cached.append(seat.num_cached)
        return seat

    monkeypatch.setattr(PagedRunner, "open", noted)
    asked = requests(lm, 200)
    found = together(lm, asked, PagedRunner(lm, 800), evicts=True, leaves=True)
    num_left = num_ties = 0
    for request, ours in zip(asked, found, strict=True):
        theirs = list(generate(alone, request))
        if not isinstance(ours[-1], Finish):  # it left: what it was told is the beginning of what it would have been
            num_left += 1
            assert [one.text for one in ours] == [one.text for one in theirs[: len(ours)]]
            continue
        (exact, near), (wanted, wanted_near) = told(ours), told(theirs)
        if exact != wanted:
            assert differ_in_ties(ours, theirs)
            num_ties += 1
        assert near == pytest.approx(wanted_near, abs=1e-4)
    assert num_ties <= 1
    assert num_left > 3
    assert sum(count > 0 for count in cached) > 20


def differ_in_ties(ours: list[Release | Finish], theirs: list[Release | Finish]) -> bool:
    """Tell whether responses differ in nothing but which of equally likely tokens are named as the likeliest."""

    def split(events: list[Release | Finish]):
        text, tokens, finish = told(events)[0]
        named = [value for one in events[:-1] for token in one.tokens for _, value in token.top_logprobs]
        return (text, [token_id for token_id, _ in tokens], finish), named

    (exact, near), (wanted, wanted_near) = split(ours), split(theirs)
    return exact == wanted and near == pytest.approx(wanted_near, abs=1e-5)


@pytest.mark.parametrize(("family", "signal"), SOME)
def test_refusals_that_are_drawn_again_are_those_that_are_drawn_again_alone(family: str, signal: str):
    changes = {"request": NEVER, "redraw_below": 0.998, "refusal": RefusalConfig(prefix="sssssssss")}
    lm, alone = (tiny_guarded_lm(family, **SIGNALS[signal] | changes) for _ in range(2))
    (letter,) = lm.tokenizer.encode("s", add_special_tokens=False)
    others = {token: -100.0 for token in range(lm.vocab_size) if token != letter}  # "s" first, then anything
    asked = [
        replace(one, sampling=replace(one.sampling, logit_bias=others)) if number % 2 else one
        for number, one in enumerate(requests(lm, 16))
    ]
    found = [told(events) for events in together(lm, asked, evicts=True)]
    expected = [told(list(generate(alone, request))) for request in asked]
    assert [exact for exact, _ in found] == [exact for exact, _ in expected]
    for (_, risks), (_, wanted) in zip(found, expected, strict=True):
        assert risks == pytest.approx(wanted, abs=1e-4)
    assert any(text[1:7] == "ssssss" != text[:6] for (text, _, _), _ in found)


def test_a_shared_beginning_is_fed_once_and_nothing_else_changes():
    lm, alone = tiny_guarded_lm(), tiny_guarded_lm()
    runner = PagedRunner(lm, 100)
    system = Message("system", "You are terse and kind to everybody who comes here and asks.")
    prompts = [lm.chat.encode([system, Message("user", text)]) for text in ("What is it?", "Who is it?")]
    found = []
    for prompt in prompts:
        seat = runner.open(prompt)
        asked = Pass(prompt.request, num_query=len(prompt.request) - prompt.query_start, asks_request=True)
        (passed,) = runner.run([(seat, asked)])
        found.append((seat.num_cached, passed.request))
        runner.close(seat)
    assert found[0][0] == 0 < found[1][0] <= prompts[1].query_start
    for prompt, (_, request) in zip(prompts, found, strict=True):
        *_, finish = generate(alone, GenerationRequest(prompt, 1, input=Mode.SCORE, output=Mode.OFF))
        assert torch.sigmoid(torch.tensor(request)).item() == pytest.approx(finish.request_risk, abs=1e-5)
    assert runner.open(prompts[1], salt="another").num_cached == 0
    assert runner.open(prompts[1], watches_request=False).num_cached > found[1][0]


def test_a_pass_says_beforehand_how_many_pages_it_takes():
    lm = tiny_guarded_lm(cls=CLS)
    runner = PagedRunner(lm, 3)
    prompt = lm.chat.encode([Message("user", "a" * 60)])
    seat = runner.open(prompt)
    asked = Pass(prompt.request)
    assert runner.size_of(seat, asked) == (len(prompt.request), -(-len(prompt.request) // 16), 0)
    (fault,) = runner.run([(seat, asked)])
    assert "pages are needed, 3 are there" in str(fault)


def test_a_fault_that_is_tried_again_leaves_nothing_behind(monkeypatch):
    lm, alone = tiny_guarded_lm(token_head=HEAD), tiny_guarded_lm(token_head=HEAD)
    faults = [RuntimeError("a fault")] * 3

    def failing(lm: GuardedLM, batch, *more):
        found = assess(lm, batch, *more)
        if len(batch) > 1 and faults:
            raise faults.pop()
        return found

    monkeypatch.setattr("server.engine.runner.assess", failing)
    asked = requests(lm, 4)
    found, expected = together(lm, asked, seed=1), [list(generate(alone, request)) for request in asked]
    assert not faults
    assert [told(events)[0] for events in found] == [told(events)[0] for events in expected]
    for events, wanted in zip(found, expected, strict=True):
        assert told(events)[1] == pytest.approx(told(wanted)[1], abs=1e-4)


def test_what_others_have_read_meanwhile_is_not_read_again():
    lm = tiny_guarded_lm()
    runner = PagedRunner(lm, 100)
    prompt = lm.chat.encode([Message("system", "You are terse and kind to all." * 3), Message("user", "What is it?")])
    seats = [runner.open(prompt) for _ in range(2)]
    asked = Pass(prompt.request, num_query=len(prompt.request) - prompt.query_start, asks_request=True)
    runner.run([(seats[0], asked)])
    assert runner.size_of(seats[1], asked).num_rows == len(prompt.request)
    assert runner.next_pass(seats[1], asked) is asked
    num_rows = len(prompt.request) - prompt.query_start // 16 * 16
    assert runner.size_of(seats[1], asked).num_rows == num_rows
