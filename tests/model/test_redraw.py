"""A refusal of the model's own, of a harmless request, in the plain loop on a scripted model.

An upper-case letter is harm; refusals begin with "sorry, no", so "sorry," opens one. One byte is one token.
"""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ClsConfig, RefusalConfig, Thresholds
from model.policy import Mode
from model.sampling import SamplingParams
from model.schedule import Annealed, Every, First, Periodic
from model.testing import ScriptedLM

REFUSAL = "sorry, no. bye."
SCHEDULES = [Every(), Periodic(2), Periodic(7), Annealed(), First()]

scripts = st.text(st.sampled_from("ab CD"), max_size=60)
schedules = st.sampled_from(SCHEDULES)


def ids_of(lm: ScriptedLM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


def doubting(script: str, second: str = "gladly: done", **changes) -> ScriptedLM:
    return ScriptedLM(script, second_script=second, **{"redraw_below": 0.5, **changes})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_refusal_of_a_clear_request_is_drawn_again_before_any_of_it_leaves(ask, schedule):
    answer = ask(doubting("sorry, I must not"), schedule=schedule)
    assert (answer.text, answer.refusal) == ("gladly: done", "")
    assert (answer.finish.reason, answer.finish.action) == ("stop", "none")
    assert answer.finish.num_withdrawn_tokens == 6
    assert answer.finish.completion_tokens == 12
    assert answer.finish.is_redrawn
    assert "".join(release.text for release in answer.releases) == "gladly: done"


@pytest.mark.parametrize("modes", [{"output": Mode.OFF}, {"output": Mode.SCORE}])
def test_it_is_held_back_where_nothing_else_is(ask, modes):
    answer = ask(doubting("sorry, I must not"), **modes)
    assert answer.text == "gladly: done"
    assert ask(doubting("sorry for it"), **modes).text == "sorry for it"


@pytest.mark.parametrize("modes", [{"input": Mode.OFF}, {"input": Mode.SCORE}])
def test_it_stands_where_the_request_side_does_not_act(ask, modes):
    assert ask(doubting("sorry, I must not"), **modes).text == "sorry, I must not"


def test_it_stands_where_the_request_is_not_clear(ask):
    lm = doubting("sorry, I must not", request=Thresholds(block=0.9999, flag=0.5))
    assert ask(lm, "Bad").text == "sorry, I must not"


def test_it_stands_without_a_threshold(ask):
    assert ask(doubting("sorry, I must not", redraw_below=0.0)).text == "sorry, I must not"


def test_it_stands_after_a_prefilled_message(ask):
    assert ask(ScriptedLM("x sorry, I must not", redraw_below=0.5), prefill="x ").text == "sorry, I must not"


def test_what_is_drawn_again_leaves_as_it_comes(ask):
    answer = ask(doubting("sorry, I must not", second="gladly"), output=Mode.OFF)
    assert [release.text for release in answer.releases if release.text] == list("gladly")


def test_it_stands_where_the_client_biased_its_first_token(ask):
    lm = doubting("sorry, I must not")
    bias = SamplingParams(temperature=0.0, logit_bias={ids_of(lm, "s")[0]: 1.0})
    assert ask(lm, sampling=bias).text == "sorry, I must not"


def test_a_refusal_of_few_tokens_is_not_told_from_an_answer(ask):
    changes = {"refusal": RefusalConfig(prefix="no.")}
    assert ask(doubting("no.. bye.", **changes)).text == "no.. bye."


def test_nothing_is_told_of_the_withdrawn_token(ask):
    answer = ask(doubting("sorry, I must not"), sampling=SamplingParams(temperature=0.0, top_logprobs=3))
    first = answer.tokens[0]
    assert first.token_id not in ids_of(ScriptedLM("x"), "s")
    assert ids_of(ScriptedLM("x"), "s")[0] not in [token for token, _ in first.top_logprobs]


def test_the_risk_of_what_was_withdrawn_is_told(ask):
    answer = ask(doubting("sORRY, I must not", refusal=RefusalConfig(prefix="sORRY, no")), output=Mode.SCORE)
    assert answer.text == "gladly: done"
    assert answer.finish.response_risk > 0.9
    assert answer.finish.num_assessments == 1 + 5 + 12  # the sixth token of the first draft was never fed


def test_an_end_that_is_drawn_instead_is_an_end(ask):
    lm = doubting("sorry, I must not", second="g")
    answer = ask(lm)
    assert (answer.text, answer.finish.reason, answer.finish.num_withdrawn_tokens) == ("g", "stop", 6)


def test_a_stop_string_that_ends_with_the_opening_does_not_keep_it(ask):
    assert ask(doubting("sorry, I must not"), stop=(",",)).text == "gladly: done"
    assert ask(doubting("sorry, I must not"), stop=("rr",)).text == "so"


@given(script=scripts, second=scripts, schedule=schedules, output=st.sampled_from([Mode.OFF, Mode.BLOCK]))
def test_of_a_refusal_that_is_drawn_again_nothing_leaves(script, second, schedule, output, ask):
    lm = doubting("sorry," + script, second="g" + second)
    answer = ask(lm, max_tokens=100, schedule=schedule, output=output)
    assert ("g" + second).startswith(answer.text)
    assert all(("g" + second).startswith(text) for text in accumulate(release.text for release in answer.releases
               if not release.is_refusal))  # fmt: skip


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_an_end_within_the_opening_is_as_long_as_it_may_be(ask, max_tokens):
    answer = ask(doubting("sorry, I must not"), max_tokens=max_tokens)
    assert answer.text == ("sorry, I must not" if max_tokens < 6 else "gladly: done")[:max_tokens]
    assert answer.finish.reason == "length"


def test_harm_in_what_is_drawn_again_is_rolled_back(ask):
    answer = ask(doubting("sorry, I must not", second="gladly: HARM at last"))
    assert (answer.text, answer.refusal) == ("gladly: ", REFUSAL)
    assert answer.finish.num_withdrawn_tokens == 6 + 3


def test_cls_reads_the_request_alone_before_what_is_drawn_again(ask):
    lm = doubting("sorry, I must not", cls=ClsConfig())
    assert ask(lm).text == "gladly: done"
    restart = next(place for place, fed in enumerate(lm.fed) if fed == tuple(ids_of(lm, "g")))
    assert [span.covers for span in lm.spans[restart]][:1] == [0]
