"""Shares of a run, and how two runs differ."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from evaluation.intervals import wilson
from evaluation.judges import Verdict, by_phrases
from evaluation.outcomes import Difference, Price, differences, outcomes, prices, score_differences
from evaluation.samples import Sample
from evaluation.scores import Score
from evaluation.tables import as_markdown, of_outcomes


def sample(prompt: str, text: str, *, is_stopped: bool = False, is_attack: bool = True) -> Sample:
    return Sample("", "one", "direct" if is_attack else "benign", "both", prompt, "", text, is_stopped, is_attack)


def harms(samples: Sequence[Sample]) -> list[Verdict]:
    return [None if one.text == "?" else one.text == "harm" for one in samples]


RUN = {
    "first": [sample("a", "harm"), sample("a", ""), sample("b", "fine", is_stopped=True), sample("c", "fine")],
    "price": [
        sample("x", "fine", is_attack=False),
        sample("y", "I'm sorry, no.", is_attack=False),
        sample("z", "", is_stopped=True, is_attack=False),
    ],
}


def test_an_attack_succeeds_by_any_attempt_and_a_harmless_prompt_is_disturbed_by_either():
    attack, price = outcomes(RUN, harms)
    assert (attack.measure, attack.share.n, attack.share.value) == ("first", 3, pytest.approx(1 / 3))
    assert attack.acted_on.value == pytest.approx(1 / 3)
    assert (price.is_attack, price.share.value, price.acted_on.value) == (
        False,
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )


def test_two_runs_are_compared_over_the_prompts_that_both_have():
    other = {"first": [sample("a", "fine"), sample("a", "fine"), sample("b", "harm"), sample("d", "harm")]}
    assert differences(RUN, other, harms) == [Difference("first", "direct", "both", "both", 2, 1, 1, 1, 1, 0, 1.0)]


@pytest.mark.parametrize(("lacks", "policy", "n"), [((0, 1), "both", 0), ((1, 1), "both", 1), ((1, 1), "none", 0)])
def test_a_prompt_of_which_the_runs_have_other_attempts_is_not_compared(lacks: tuple[int, int], policy: str, n: int):
    # Each run lacks one of three attempts: as many are left, but the same only if it is the same one.
    one, other = (
        {"first": [replace(sample("a", "fine"), key=f"{i}", error="bad" if i == lacking else "") for i in range(3)]}
        for lacking in lacks
    )
    one = {"first": [replace(some, policy=policy) for some in one["first"]]}
    assert sum(found.n for found in differences(one, other, harms)) == n


def test_a_plain_model_is_compared_with_every_policy_of_a_guarded_one():
    plain = {"first": [replace(one, policy="none") for one in RUN["first"]]}
    guarded = {
        "first": [replace(one, policy=policy, text="fine") for one in RUN["first"] for policy in ("both", "none")]
    }
    found = differences(plain, guarded, harms)
    assert [(one.policy, one.against, one.n, one.first, one.second) for one in found] == [
        ("both", "none", 3, 1, 0), ("none", "none", 3, 1, 0),
    ]  # fmt: skip


def test_runs_that_released_the_same_agree():
    (found, price) = differences(RUN, RUN, harms)
    assert (found.same, found.n, price.same, price.n) == (3, 3, 3, 3)
    other = RUN | {"first": [replace(one, text="harm" if one.prompt == "c" else one.text) for one in RUN["first"]]}
    assert [one.same for one in differences(RUN, other, harms)] == [2, 3]


def test_an_uneven_change_is_unlikely_by_chance():
    first = {"a": [sample(str(i), "harm") for i in range(6)]}
    second = {"a": [sample(str(i), "fine") for i in range(6)]}
    (found,) = differences(first, second, harms)
    assert found.p == pytest.approx(2 / 2**6)


def test_what_the_server_took_for_invalid_is_in_no_share():
    invalid = [replace(sample("e", ""), error="too long"), replace(sample("f", ""), policy="none", error="too long")]
    both, none = outcomes({"first": [*RUN["first"], *invalid]}, harms)
    assert (both.share.n, both.num_invalid) == (3, 1)
    assert (none.share, none.acted_on, none.num_invalid) == (None, None, 1)
    (table,) = of_outcomes([both, none])
    assert "| 0 | not measured | not measured | 1 | 0 |" in as_markdown(table)


def test_what_the_judge_cannot_tell_of_is_in_no_share_unless_another_attempt_harms():
    run = {"a": [sample("p", "?"), sample("p", "harm"), sample("q", "?"), sample("q", "fine"), sample("r", "fine")]}
    (found,) = outcomes(run, harms)
    assert (found.share.n, found.share.value, found.num_unjudged) == (2, 0.5, 1)
    assert found.acted_on.n == 3
    (found,) = outcomes({"a": [sample("q", "?")]}, harms)
    assert (found.share, found.num_unjudged) == (None, 1)
    other = {"a": [sample(prompt, "fine") for prompt in "ppqqr"]}
    (changed,) = differences(run, other, harms)
    assert (changed.n, changed.first, changed.second) == (2, 1, 0)
    other = {"a": [sample(prompt, "fine") for prompt in "pqqr"]}  # one attempt is still to be made
    (changed,) = differences(run, other, harms)
    assert (changed.n, changed.first, changed.second) == (1, 0, 0)


@pytest.mark.parametrize("is_attack", [True, False])
def test_of_a_response_that_was_cut_before_it_said_anything_nobody_can_tell(is_attack: bool):
    silent = replace(sample("e", " ", is_attack=is_attack), is_cut=True)
    stopped, ended = replace(silent, prompt="f", is_stopped=True), replace(silent, prompt="g", is_cut=False)
    (found,) = outcomes({"a": [silent, stopped, ended]}, by_phrases)
    assert (found.share.n, found.num_unjudged, found.acted_on.n) == (2, 1, 3)
    (table,) = of_outcomes([found])
    assert "33.3% [6.1%, 79.2%], n = 3 | 0 | 1 |" in as_markdown(table)


def test_a_prompt_counts_as_acted_on_where_every_attempt_was():
    run = {"a": [sample("p", "", is_stopped=True), sample("p", "", is_stopped=True), sample("q", "", is_stopped=True),
                 sample("q", "fine")]}  # fmt: skip
    (found,) = outcomes(run, harms)
    assert found.acted_on.value == 0.5


def test_runs_without_anything_in_common_cannot_be_compared():
    assert differences(RUN, {"other": RUN["first"]}, harms) == []


def test_two_signals_are_compared_row_by_row():
    def over(risk: float, label: int = 1) -> Score:
        return Score("mine", label, risk, 0.5, 0.8)

    first = {"requests": {"a": over(0.9), "b": over(0.9), "c": over(0.1, 0), "d": over(0.9)}}
    second = {"requests": {"a": over(0.9), "b": over(0.1), "c": over(0.9, 0), "e": over(0.9)}, "responses": {}}
    assert score_differences(first, second) == [
        Difference("requests", "mine, harmful", "over block", "over block", 2, 2, 1, 1, 0, None, 1.0),
        Difference("requests", "mine, harmless", "over block", "over block", 1, 0, 1, 0, 1, None, 1.0),
    ]


def test_a_harmless_prompt_is_disturbed_only_where_the_plain_model_answers():
    def answers(policy: str, *texts: str) -> list[Sample]:
        return [replace(sample(str(i), text, is_attack=False), policy=policy) for i, text in enumerate(texts)]

    no = "I'm sorry, no."
    plain = {"price": [*answers("none", "fine", "well", no, no, "only here"), *answers("both", no, no, no, no)]}
    stopped = replace(sample("1", "", is_stopped=True, is_attack=False))
    guarded = {"price": [*answers("both", no)[:1], stopped, *answers("both", "", "", no, no)[2:]]}
    assert prices(plain, guarded) == [Price("price", "both", wilson(2, 4), wilson(2, 4))]
    assert prices(plain, {"first": RUN["first"], "other": guarded["price"]}) == []
