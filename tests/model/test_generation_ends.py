"""How a response of the plain loop ends: its last assessment, stop strings, limits, and what is counted.

An upper-case letter is harm. The tiny configuration: block at 0.9, onset at 0.5, no smoothing,
patience 3, lookback 8; refusals begin with "sorry, no" (9 tokens) and go on with the script ". bye."
(6 tokens). One byte is one token.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.policy import Mode
from model.sampling import SamplingParams
from model.schedule import Annealed, Every, First, Periodic
from model.testing import ScriptedLM

REFUSAL = "sorry, no. bye."
SCHEDULES = [Every(), Periodic(2), Periodic(7), Annealed(), First()]
BOTH_OFF = {"input": Mode.OFF, "output": Mode.OFF}


def ids_of(lm: ScriptedLM, text: str) -> list[int]:
    return lm.tokenizer.encode(text, add_special_tokens=False)


# The last assessment


class ListeningLM(ScriptedLM):
    """Keeps the text that each assessment of a response covers."""

    def __init__(self, *args, **changes) -> None:
        super().__init__(*args, **changes)
        self.covered: list[str] = []
        self._read = ""

    def forward(self, token_ids, cache, *, states_of_last=0, spans=()):
        output = super().forward(token_ids, cache, states_of_last=states_of_last, spans=spans)
        if states_of_last:  # the head reads these states until there are newer ones
            self._read = self._split(list(cache))[1]
        return output

    def assess(self, side, features):
        if side == "response":
            self.covered.append(self._read)
        return super().assess(side, features)


@given(
    script=st.text(st.sampled_from("ab CD"), max_size=60),
    schedule=st.sampled_from(SCHEDULES),
    policy=st.fixed_dictionaries({"lookback": st.integers(0, 12), "patience": st.integers(1, 4)}),
    output=st.sampled_from([Mode.SCORE, Mode.BLOCK]),
    stop=st.sampled_from([(), ("b",), (" a", "CD")]),
    max_tokens=st.integers(1, 70),
)
def test_whatever_ends_a_response_its_last_assessment_covers_all_of_it(
    script, schedule, policy, output, stop, max_tokens, ask
):
    lm = ListeningLM(script, **policy)
    answer = ask(lm, schedule=schedule, output=output, stop=stop, max_tokens=max_tokens)
    last = next((text for text in reversed(lm.covered) if not text.startswith("sorry")), "")
    assert last.startswith(answer.text)
    if answer.finish.action == "none":  # nothing was withdrawn, so what was generated ends with a limit or a stop
        ends = [script.find(one) + len(one) for one in stop if one in script]
        assert last == script[: min([max_tokens, *ends])]
    else:
        assert lm.covered[-1] == answer.refusal == REFUSAL


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("hello worlD", {}),  # ends by itself
        ("hello worlD again", {"stop": ("D",)}),
        ("hello worlD again", {"max_tokens": 11}),
    ],
)
def test_every_end_is_assessed_with_patience_one(schedule, script: str, changes, ask):
    answer = ask(ScriptedLM(script), schedule=schedule, **changes)
    assert answer.finish.action == "rolled_back"
    assert "D" not in answer.text


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("changes", [{}, {"stop": ("wor",)}, {"max_tokens": 9}])
def test_an_end_without_harm_stays_as_it_is(schedule, changes, ask):
    answer = ask(ScriptedLM("hello world"), schedule=schedule, **changes)
    assert answer.finish.action == "none"
    assert answer.finish.num_assessments >= 2  # the request and the end at least


def test_the_sparsest_schedule_assesses_request_and_end_alone(ask):
    answer = ask(ScriptedLM("hello world"), schedule=First())
    assert answer.finish.num_assessments == 2
    assert [token.risk is None for token in answer.tokens] == [True] * 10 + [False]


def test_an_answer_of_nothing_needs_no_assessment(ask):
    answer = ask(ScriptedLM(""))
    assert (answer.text, answer.finish.reason, answer.finish.response_risk) == ("", "stop", None)


def test_the_last_assessment_feeds_no_token_again(ask):
    # "c" was fed without an assessment; what the head reads at it was kept.
    lm = ScriptedLM("abc")
    ask(lm, schedule=First())
    a, b, c = ids_of(lm, "abc")
    assert lm.fed[1:] == [(a,), (b,), (c,)]


# Ends and counts


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("stop",), "one two "),
        (("s", "stop"), "one two "),
        (("two stop", "wo"), "one t"),
        (("never",), "one two stop three"),
        (("three!",), "one two stop three"),
    ],
)
def test_stop_strings_over_token_borders_end_the_answer_and_do_not_leave(stop, expected: str, ask):
    answer = ask(ScriptedLM("one two stop three"), stop=stop)
    assert answer.text == expected
    assert answer.finish.reason == "stop"
    assert answer.finish.completion_tokens == len(expected)


def test_a_stop_string_across_the_border_to_a_prefill_is_not_one(ask):
    assert ask(ScriptedLM("one two"), prefill="one t", stop=("tw",)).text == "wo"


@pytest.mark.parametrize(("max_tokens", "reason"), [(1, "length"), (4, "length"), (5, "length"), (6, "stop")])
def test_max_tokens_end_the_answer(max_tokens: int, reason: str, ask):
    answer = ask(ScriptedLM("hello"), max_tokens=max_tokens)
    assert answer.text == "hello"[:max_tokens]
    assert answer.finish.reason == reason


def test_min_tokens_put_the_end_off(ask):
    # After its script the model would end; what it says then does not matter.
    assert len(ask(ScriptedLM("ab"), sampling=SamplingParams(temperature=0, min_tokens=5)).tokens) >= 5


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [
        (0, "one "),
        (6, "one "),  # the stop string ends with the seventh token
        (7, "one two stop "),
        (12, "one two stop "),
        (15, "one two stop "),  # the second one ends with the sixteenth
        (16, "one two stop two three"),
    ],
)
def test_a_stop_string_within_min_tokens_is_ordinary_text(min_tokens: int, expected: str, ask):
    sampling = SamplingParams(temperature=0, min_tokens=min_tokens)
    answer = ask(ScriptedLM("one two stop two three"), stop=("two",), sampling=sampling)
    assert (answer.text, answer.finish.reason) == (expected, "stop")


def test_a_stop_string_within_min_tokens_is_released_as_it_comes(ask):
    sampling = SamplingParams(temperature=0, min_tokens=7)
    answer = ask(ScriptedLM("one two and more"), stop=("two",), sampling=sampling, **BOTH_OFF)
    assert answer.text == "one two and more"
    assert "two" in "".join(release.text for release in answer.releases[:12])


def test_a_rollback_looks_for_stop_strings_as_before_within_min_tokens(ask):
    # The text that is kept is pushed again; its stop string is still ordinary text.
    sampling = SamplingParams(temperature=0, min_tokens=7)
    answer = ask(ScriptedLM("one two and more HARM"), stop=("two",), sampling=sampling)
    assert (answer.text, answer.finish.action) == ("one two and more ", "rolled_back")


def test_ignore_eos_goes_on_to_max_tokens(ask):
    answer = ask(ScriptedLM("ab"), sampling=SamplingParams(temperature=0, ignore_eos=True), max_tokens=6)
    assert (len(answer.tokens), answer.text, answer.finish.reason) == (6, "ab", "length")


def test_usage_counts_prompt_with_prefill_and_what_was_released(ask):
    # "<|im_start|>user\n" 6, "hi" 2, "<|im_end|>\n" 2, "<|im_start|>assistant\n" 11; prefill 4; answer 7.
    finish = ask(ScriptedLM("one two end"), prefill="one ").finish
    assert (finish.prompt_tokens, finish.completion_tokens) == (6 + 2 + 2 + 11 + 4, 7)


def test_usage_of_a_rollback_counts_what_was_kept_and_the_refusal(ask):
    finish = ask(ScriptedLM("clear HARM")).finish
    assert finish.completion_tokens == len("clear ") + len(REFUSAL)


def test_usage_of_a_refusal_counts_prefix_and_continuation(ask):
    assert ask(ScriptedLM(""), "Bad").finish.completion_tokens == len(REFUSAL)
