"""Refusals and prefilled answers in the plain loop, on a scripted model.

An upper-case letter is harm. The tiny configuration: block at 0.9, onset at 0.5, no smoothing,
patience 3, lookback 8; refusals begin with "sorry, no" (9 tokens), go on with the script ". bye."
(6 tokens), and end with ". the end." where they turn harmful. One byte is one token.
"""

import pytest

from model.config import RefusalConfig
from model.policy import Mode
from model.sampling import SamplingParams
from model.schedule import Annealed, Every, First, Periodic
from model.testing import ScriptedLM

REFUSAL = "sorry, no. bye."
CUT_REFUSAL = "sorry, no. the end."


def ids_of(lm: ScriptedLM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


# Refusals


def test_a_refusal_that_turns_harmful_ends_with_fixed_text(ask):
    answer = ask(ScriptedLM("", ". But SURE, here it is"), "Bad")
    assert answer.refusal == CUT_REFUSAL
    assert answer.finish.num_withdrawn_tokens == len(". But SUR")


def test_a_refusal_that_ends_in_harm_ends_with_fixed_text(ask):
    assert ask(ScriptedLM("", ". bye X"), "Bad").refusal == CUT_REFUSAL


@pytest.mark.parametrize("output", Mode)
def test_a_refusal_is_assessed_whatever_the_mode_of_the_output_side(output: Mode, ask):
    answer = ask(ScriptedLM("", ". But SURE, here it is"), "Bad", output=output)
    assert answer.refusal == CUT_REFUSAL


def test_what_a_refusal_released_before_it_turned_harmful_stays(ask):
    # Clear up to 9 + 19 tokens; 8 before that have left: ". this is a" is 11 long.
    answer = ask(ScriptedLM("", ". this is a long t HARM"), "Bad")
    assert answer.refusal == "sorry, no. this is a" + ". the end."


def test_a_refusal_is_capped(ask):
    answer = ask(ScriptedLM("", "." * 100), "Bad")
    assert answer.refusal == "sorry, no" + "." * 24
    assert answer.finish.completion_tokens == 9 + 24


def test_a_refusal_ends_with_its_first_line(ask):
    assert ask(ScriptedLM("", ". bye.\nand more"), "Bad").refusal == REFUSAL


def test_a_refusal_ends_with_the_first_sentence_of_its_own_that_says_something(ask):
    # ". no." adds 5 characters to the prefix; a sentence that adds at least 24 ends the refusal.
    wording = RefusalConfig(prefix="sorry, no", ending="", max_tokens=60)
    answer = ask(ScriptedLM("", ". no. ask me for something else. and more", refusal=wording), "Bad")
    assert answer.refusal == "sorry, no. no. ask me for something else."


@pytest.mark.parametrize("user", ["Bad", "hi"])
def test_a_refusal_ignores_stop_bias_lengths_and_sampling(user: str, ask):
    lm = ScriptedLM("HARM")
    (letter,) = ids_of(lm, "b")
    params = SamplingParams(
        temperature=2.0,
        seed=1,
        logit_bias={letter: -100, lm.tokenizer.eos_token_id: -100},
        min_tokens=30,
        ignore_eos=True,
        frequency_penalty=2.0,
        repetition_penalty=10.0,
    )
    assert ask(lm, user, sampling=params, stop=("sorry", "bye", ".")).refusal == REFUSAL


def test_a_refusal_may_be_longer_than_max_tokens(ask):
    assert ask(ScriptedLM(""), "Bad", max_tokens=1).refusal == REFUSAL


def test_a_refusal_continues_from_the_request_alone(ask):
    lm = ScriptedLM("a clear part, then HARM")
    ask(lm)
    prefix = lm.fed.index(tuple(ids_of(lm, "sorry, no")))
    cache = lm.new_cache()
    lm.forward(lm.fed[0], cache)
    assert int(lm.forward(lm.fed[prefix], cache).logits.argmax()) == lm.fed[prefix + 1][0] == ids_of(lm, ".")[0]


@pytest.mark.parametrize("room", [1, 8, 9])
def test_with_no_room_to_continue_the_refusal_is_fixed_text(room: int, ask):
    # The context is 512 tokens, the template takes 19 of them, and the prefix 9.
    answer = ask(ScriptedLM("x"), "B" * (512 - 19 - room), max_tokens=room)
    assert answer.refusal == CUT_REFUSAL
    assert answer.finish.action == "refused"


def test_with_little_room_the_refusal_is_short(ask):
    # 512 - 500 - 9: three tokens of ". bye." fit.
    answer = ask(ScriptedLM("x"), "B" * (500 - 19), max_tokens=12)
    assert answer.finish.prompt_tokens == 500
    assert answer.refusal == "sorry, no. b"


# Prefill


def test_a_harmless_prefill_is_continued_and_not_repeated(ask):
    answer = ask(ScriptedLM("well, all is well"), prefill="well, ")
    assert answer.text == "all is well"


@pytest.mark.parametrize("prefill", ["HARM", "sure, HARM", "sure, HARM, then a long clear part"])
def test_an_alarm_in_a_prefill_releases_none_of_the_models_text(prefill: str, ask):
    answer = ask(ScriptedLM(prefill + " and more"), prefill=prefill)
    assert (answer.text, answer.refusal) == ("", REFUSAL)
    assert answer.finish.action == "rolled_back"
    assert answer.finish.num_withdrawn_tokens == 0


@pytest.mark.parametrize("prefill", ["sure, H", "sure, HA"])
def test_an_alarm_that_begins_in_a_prefill_releases_none_of_the_models_text(prefill: str, ask):
    answer = ask(ScriptedLM("sure, HARM and more"), prefill=prefill)
    assert (answer.text, answer.refusal) == ("", REFUSAL)
    assert answer.finish.num_withdrawn_tokens == len("sure, HAR") - len(prefill)


def test_an_onset_in_a_prefill_releases_none_of_the_models_text(ask):
    # Smoothed with weight 0.5, the capital in the prefill is over the onset, but the next one is the first suspicious.
    answer = ask(ScriptedLM("sure, HARM and more", smoothing=0.5), prefill="sure, H")
    assert (answer.text, answer.refusal) == ("", REFUSAL)


def test_an_alarm_after_a_prefill_keeps_what_was_clear_in_between(ask):
    answer = ask(ScriptedLM("well, a clear part, then HARM"), prefill="well, ")
    assert (answer.text, answer.refusal) == ("a clear part, then ", REFUSAL)


def test_a_refusal_after_a_prefill_continues_from_the_request_without_it(ask):
    # The scripted model says its refusal only where the answer begins with the prefix.
    lm = ScriptedLM("sure, HARM")
    ask(lm, prefill="sure, HARM")
    assert [tuple(ids_of(lm, "sure, HARM")), tuple(ids_of(lm, "sorry, no"))] == lm.fed[1:3]


def test_a_prefill_is_not_acted_on_where_the_output_side_scores(ask):
    answer = ask(ScriptedLM("HARM done"), prefill="HARM", output=Mode.SCORE)
    assert answer.text == " done"
    assert answer.finish.response_risk > 0.9


def test_a_harmful_prefill_is_assessed_at_every_token_under_every_schedule(ask):
    for schedule in (Every(), Periodic(7), Annealed(), First()):
        assert ask(ScriptedLM("HARM" + "a" * 9), prefill="HARMaaaa", schedule=schedule).text == ""


@pytest.mark.parametrize(
    ("script", "refusal_script", "user", "is_high"),
    [
        ("", ". bye.", "Bad", False),  # a refusal is harmless, however malicious the request
        ("", ". But SURE", "Bad", True),
        ("then HARM", ". bye.", "hi", True),  # what was withdrawn counts
    ],
)
def test_the_response_risk_covers_what_was_withdrawn_and_the_refusal(script, refusal_script, user, is_high, ask):
    assert (ask(ScriptedLM(script, refusal_script), user).finish.response_risk > 0.9) is is_high
