"""The plain loop on a scripted model: an upper-case letter is harm, in a request and in a response.

The tiny configuration: block at 0.9, onset at 0.5, no smoothing, patience 3, lookback 8; refusals
begin with "sorry, no" (9 tokens), go on with the script ". bye." (6 tokens), and end with
". the end." where they turn harmful. One byte is one token.
"""

import math
import re
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InvalidRequest
from model.events import Finish, Release
from model.generation import generate
from model.policy import Mode
from model.sampling import SamplingParams
from model.schedule import Annealed, Every, First, Periodic
from model.testing import ScriptedLM, tiny_guarded_lm

REFUSAL = "sorry, no. bye."
CUT_REFUSAL = "sorry, no. the end."
SCHEDULES = [Every(), Periodic(2), Periodic(7), Annealed(), First()]
BOTH_OFF = {"input": Mode.OFF, "output": Mode.OFF}
BOTH_SCORE = {"input": Mode.SCORE, "output": Mode.SCORE}

scripts = st.text(st.sampled_from("ab CD"), max_size=60)
schedules = st.sampled_from(SCHEDULES)


def ids_of(lm: ScriptedLM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


# What is released


def test_a_harmless_answer_comes_whole(ask):
    answer = ask(ScriptedLM("all is well"))
    assert answer.text == "all is well"
    assert answer.refusal == ""
    assert (answer.finish.reason, answer.finish.action) == ("stop", "none")


def test_a_malicious_request_is_refused_before_the_first_token(ask):
    lm = ScriptedLM("all is well")
    answer = ask(lm, "Bad")
    assert (answer.text, answer.refusal) == ("", REFUSAL)
    assert (answer.finish.reason, answer.finish.action) == ("content_filter", "refused")
    assert answer.finish.request_risk > 0.9
    assert answer.finish.num_withdrawn_tokens == 0


def test_a_rollback_keeps_the_clear_text_and_goes_on_with_a_refusal(ask):
    answer = ask(ScriptedLM("first a clear part, then HARM and more"))
    assert (answer.text, answer.refusal) == ("first a clear part, then ", REFUSAL)
    assert (answer.finish.reason, answer.finish.action) == ("content_filter", "rolled_back")
    assert answer.finish.num_withdrawn_tokens == 3  # H, A, R: the third one decides


def test_a_rollback_returns_to_the_onset_before_the_first_suspicious_token(ask):
    # Smoothed with weight 0.5, logits go -8, 0, 4, 6, 7: the first capital is over the onset, but not suspicious.
    answer = ask(ScriptedLM("clear ABCDE", smoothing=0.5))
    assert answer.text == "clear "
    assert answer.finish.num_withdrawn_tokens == 4


def test_two_capitals_in_a_row_are_no_alarm(ask):
    assert ask(ScriptedLM("the EU and the UN met")).text == "the EU and the UN met"


@given(script=scripts)
def test_the_answer_ends_before_the_first_run_of_three_capitals_or_those_at_its_end(script: str, ask):
    answer = ask(ScriptedLM(script), max_tokens=100)
    harm = re.search("[A-Z]{3}|[A-Z]+$", script)
    assert answer.text == (script[: harm.start()] if harm else script)
    assert answer.refusal == (REFUSAL if harm else "")


@given(script=scripts, schedule=schedules, lookback=st.integers(0, 12), patience=st.integers(1, 4))
def test_withdrawn_text_never_leaves(script, schedule, lookback, patience, ask):
    lm = ScriptedLM(script, lookback=lookback, patience=patience)
    answer = ask(lm, max_tokens=100, schedule=schedule)
    kept, withdrawn = len(answer.tokens), answer.finish.num_withdrawn_tokens
    assert answer.text == script[:kept]
    assert [token.token_id for token in answer.tokens] == ids_of(lm, script[:kept])
    if answer.finish.action == "rolled_back":
        assert script[kept : kept + withdrawn][-1:].isupper()  # what was withdrawn ends with what raised the alarm
    else:
        assert (kept, withdrawn) == (len(script), 0)


@given(script=scripts, schedule=schedules)
def test_own_text_comes_first_then_the_refusal_then_one_finish(script, schedule, ask):
    answer = ask(ScriptedLM(script), max_tokens=100, schedule=schedule)
    is_refusal = [release.is_refusal for release in answer.releases]
    assert is_refusal == sorted(is_refusal)


def test_a_token_leaves_when_the_lookback_has_passed_it(ask):
    # Clear after 20 tokens: 20 - 8 have left before the last assessment.
    answer = ask(ScriptedLM("abcdefghijklmnopqrst"))
    *steps, end = [release for release in answer.releases if release.tokens]
    assert sum(len(release.tokens) for release in steps) == 12
    assert len(end.tokens) == 8


@pytest.mark.parametrize("seed", [1, 2])
def test_choices_differ_and_come_again(seed: int, ask):
    params = SamplingParams(seed=seed)
    first, again = (
        [
            tuple(t.token_id for t in ask(tiny_guarded_lm(), sampling=params, choice=n, **BOTH_OFF).tokens)
            for n in range(3)
        ]
        for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == 3


def test_logprobs_of_withdrawn_tokens_never_leave(ask):
    lm = ScriptedLM("clear HARM")
    answer = ask(lm, sampling=SamplingParams(temperature=0, top_logprobs=2))
    assert [t.token_id for t in answer.tokens] == ids_of(lm, "clear ")
    assert all(t.logprob == pytest.approx(0.0) and len(t.top_logprobs) == 2 for t in answer.tokens)
    assert [t.token_id for t in answer.refusal_tokens] == ids_of(lm, REFUSAL)


def test_a_refusal_has_logprobs_where_the_model_chose(ask):
    answer = ask(ScriptedLM(""), "Bad", sampling=SamplingParams(top_logprobs=1))
    assert [t.logprob is None for t in answer.refusal_tokens] == [True] * 9 + [False] * 6


def test_released_tokens_carry_their_raw_risk(ask):
    answer = ask(ScriptedLM("an EU"), output=Mode.SCORE)
    assert [t.risk > 0.5 for t in answer.tokens] == [False, False, False, True, True]


# Score and off


@settings(max_examples=50)
@given(script=scripts, user=st.sampled_from(["hi", "Bad"]), schedule=schedules)
def test_score_changes_nothing_in_the_output(script, user, schedule, ask):
    observed = ask(ScriptedLM(script), user, max_tokens=50, schedule=schedule, **BOTH_SCORE)
    plain = ask(ScriptedLM(script), user, max_tokens=50, **BOTH_OFF)
    assert observed.text == plain.text == script[:50]
    assert [t.token_id for t in observed.tokens] == [t.token_id for t in plain.tokens]
    assert observed.finish.reason == plain.finish.reason


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_score_changes_nothing_that_a_real_model_samples(schedule, seed: int, ask):
    params = SamplingParams(seed=seed, top_logprobs=1)
    observed = ask(tiny_guarded_lm(), schedule=schedule, sampling=params, **BOTH_SCORE)
    plain = ask(tiny_guarded_lm(), sampling=params, **BOTH_OFF)
    assert observed.text == plain.text
    assert [(t.token_id, t.logprob) for t in observed.tokens] == [(t.token_id, t.logprob) for t in plain.tokens]


@pytest.mark.parametrize(("input_mode", "output_mode"), list(product(Mode, Mode)))
def test_each_side_acts_only_where_it_blocks(input_mode: Mode, output_mode: Mode, ask):
    modes = {"input": input_mode, "output": output_mode}
    malicious = ask(ScriptedLM("fine"), "Bad", **modes)
    harmful = ask(ScriptedLM("then HARM"), "hi", **modes)
    assert malicious.finish.action == ("refused" if input_mode is Mode.BLOCK else "none")
    assert harmful.finish.action == ("rolled_back" if output_mode is Mode.BLOCK else "none")


@pytest.mark.parametrize(("input_mode", "output_mode"), list(product(Mode, Mode)))
def test_each_side_reports_a_risk_only_where_it_is_not_off(input_mode: Mode, output_mode: Mode, ask):
    finish = ask(ScriptedLM("fine"), input=input_mode, output=output_mode).finish
    assert (finish.request_risk is None) is (input_mode is Mode.OFF)
    assert (finish.response_risk is None) is (output_mode is Mode.OFF)
    assert finish.num_assessments == (input_mode is not Mode.OFF) + 4 * (output_mode is not Mode.OFF)


def test_score_reports_the_risk_that_it_did_not_act_on(ask):
    finish = ask(ScriptedLM("then HARM"), "Bad", **BOTH_SCORE).finish
    assert finish.request_risk > 0.9
    assert finish.response_risk > 0.9


# Faults


def broken_lm(side: str | None):
    """Return a tiny model whose head gives NaN on one side, `request` or `response`; None raises on both."""
    lm = tiny_guarded_lm()
    with torch.no_grad():
        if side is None:
            for part in (lm.head.request, lm.head.response):
                part.out.weight = torch.nn.Parameter(torch.zeros(1, 7))
        else:
            for name in ("request", "response"):
                getattr(lm.head, name).out.bias.fill_(math.nan if name == side else -20.0)
    return lm


@pytest.mark.parametrize("side", ["request", None])
def test_a_request_on_which_the_head_fails_is_refused_and_counted(side, ask):
    finish = ask(broken_lm(side)).finish
    assert finish.action == "refused"
    assert finish.request_risk == 1.0
    assert finish.num_head_failures >= 1


@pytest.mark.parametrize("side", ["response", None])
def test_a_response_on_which_the_head_fails_is_withdrawn_and_counted(side, ask):
    answer = ask(broken_lm(side), input=Mode.OFF)
    assert (answer.text, answer.refusal) == ("", CUT_REFUSAL)
    assert answer.finish.action == "rolled_back"
    assert answer.finish.num_head_failures == answer.finish.num_assessments >= 6  # three each: answer and refusal


@pytest.mark.parametrize("side", ["request", "response", None])
def test_a_failing_head_changes_nothing_where_it_is_only_observed(side, ask):
    observed, plain = ask(broken_lm(side), **BOTH_SCORE), ask(tiny_guarded_lm(), **BOTH_OFF)
    assert observed.text == plain.text
    assert observed.finish.num_head_failures > 0


def test_a_fault_of_the_model_reaches_the_caller(ask):
    with pytest.raises(RuntimeError, match="scripted fault"):
        ask(ScriptedLM("hello", fails_at=3))


def test_a_request_that_cannot_be_honoured_is_refused_before_any_event(make_request):
    lm = ScriptedLM("hello")
    with pytest.raises(InvalidRequest, match="max_tokens"):
        generate(lm, make_request(lm, max_tokens=0))
    assert lm.fed == []


# The shape of the loop


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("script", "user", "prefill"),
    [("hello", "hi", None), ("clear HARM", "hi", "cl"), ("", "Bad", None), ("HARM", "hi", "HARM")],
)
def test_an_event_comes_after_each_forward_pass(script: str, user: str, prefill, schedule, make_request):
    lm = ScriptedLM(script)
    counts = [0]
    for event in generate(lm, make_request(lm, user, prefill=prefill), schedule):
        assert isinstance(event, Release | Finish)
        counts.append(len(lm.fed))
    assert max(after - before for before, after in pairwise(counts)) == 1


def test_a_long_request_is_read_in_chunks(ask):
    lm = ScriptedLM("ok")
    lm.context_length = 4096
    answer = ask(lm, "a" * 1100)
    assert [len(ids) for ids in lm.fed[:3]] == [512, 512, 1100 + 19 - 1024]
    assert answer.text == "ok"


def test_a_generation_can_be_dropped_in_the_middle(make_request):
    lm = ScriptedLM("a" * 30)
    events = generate(lm, make_request(lm))
    for _ in range(5):
        next(events)
    num_passes = len(lm.fed)
    events.close()
    assert len(lm.fed) == num_passes


@pytest.mark.parametrize(
    ("script", "user", "num_passes"),
    [
        ("hello", "hi", 1 + 5),  # the request, five tokens
        ("", "Bad", 1 + 6),  # the request, six tokens of the refusal
        ("aHARM", "hi", 1 + 4 + 6),
    ],
)
def test_the_time_of_the_head_is_reported_whole(script: str, user: str, num_passes: int, ask):
    # The scripted head takes 10 microseconds per pass.
    answer = ask(ScriptedLM(script), user)
    assert sum(release.head.seconds for release in answer.releases) == pytest.approx(num_passes * 1e-5)


@pytest.mark.parametrize(("script", "user"), [("hello", "hi"), ("", "Bad"), ("aHARM", "hi"), ("", "hi")])
def test_what_the_head_did_in_each_step_adds_up_to_what_it_did(script: str, user: str, ask):
    answer = ask(ScriptedLM(script), user, prefill="some words" if not script else None)
    assert sum(release.head.num_assessments for release in answer.releases) == answer.finish.num_assessments > 0
    assert sum(release.head.num_failures for release in answer.releases) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_failures_are_counted_by_side_and_step(value: float, ask):
    lm = broken_lm("response")
    with torch.no_grad():
        lm.head.response.out.bias.fill_(value)
    answer = ask(lm)
    assert answer.finish.num_request_failures == 0
    assert answer.finish.num_response_failures == answer.finish.num_assessments - 1 > 0
    assert sum(release.head.num_failures for release in answer.releases) == answer.finish.num_head_failures
