"""Every parameter against a distribution worked out by hand, over vocabularies of three to five tokens."""

import math
from collections import Counter

import pytest
import torch

from model.errors import InvalidRequest
from model.sampling import GREEDY, RANGES, SamplingParams, adjust, draw, filtered_probabilities, generator_for

NO_EOS: frozenset[int] = frozenset()


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def filtered(probabilities: tuple[float, ...], **changes) -> list[float]:
    return filtered_probabilities(logits_of(*probabilities), SamplingParams(**changes)).tolist()


def adjusted(logits: list[float], *, prompt=(), output=(), eos_ids=NO_EOS, **changes) -> list[float]:
    return adjust(torch.tensor(logits), SamplingParams(**changes), prompt, output, eos_ids).tolist()


def drawn(logits: torch.Tensor, params: SamplingParams, count: int) -> list[int]:
    generator = generator_for(params)
    return [draw(logits, params, generator).token_id for _ in range(count)]


def test_by_default_the_distribution_is_the_models_own():
    assert filtered((0.5, 0.3, 0.2)) == pytest.approx([0.5, 0.3, 0.2])


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_k": 70}, {"top_p": 0.05}, {"top_p": 0.7}, {"top_p": 0.999}])
def test_of_many_tokens_those_stay_that_stay_when_all_are_put_in_order(changes, spread: float):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5000, generator=generator) * spread).bfloat16().float()  # many are equal
    probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
    kept = torch.arange(5000) < changes.get("top_k", 5000)
    kept &= probabilities.cumsum(-1) - probabilities < changes.get("top_p", 1.0)
    found = filtered_probabilities(logits, SamplingParams(**changes))
    assert found.nonzero()[:, 0].tolist() == sorted(order[kept].tolist())
    assert found.sum().item() == pytest.approx(1, abs=1e-4)


def test_temperature_is_an_exponent():
    # At temperature 0.5 probabilities are squared: 0.25, 0.09, 0.04 over their sum, 0.38.
    assert filtered((0.5, 0.3, 0.2), temperature=0.5) == pytest.approx([25 / 38, 9 / 38, 4 / 38])


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-50, 1e-300])
def test_a_temperature_near_zero_leaves_the_most_likely_token(temperature: float):
    assert filtered((0.3, 0.5, 0.2), temperature=temperature) == [0.0, 1.0, 0.0]


def test_temperature_zero_takes_the_most_likely_token():
    assert set(drawn(logits_of(0.3, 0.4, 0.3), GREEDY, 20)) == {1}


def test_top_k_keeps_the_k_most_likely():
    # 0.4 and 0.3 over their sum, 0.7.
    assert filtered((0.3, 0.2, 0.4, 0.1), top_k=2) == pytest.approx([3 / 7, 0, 4 / 7, 0])


@pytest.mark.parametrize("top_k", [0, -1, 3, 100])
def test_top_k_of_nothing_or_everything_keeps_all(top_k: int):
    assert filtered((0.5, 0.3, 0.2), top_k=top_k) == pytest.approx([0.5, 0.3, 0.2])


def test_top_k_of_one_is_greedy_even_between_equals():
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0])
    assert set(drawn(logits, SamplingParams(top_k=1, seed=0), 50)) == set(drawn(logits, GREEDY, 1)) == {1}


def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass():
    # 0.4 + 0.3 is short of 0.75, 0.4 + 0.3 + 0.2 is not.
    assert filtered((0.3, 0.2, 0.4, 0.1), top_p=0.75) == pytest.approx([3 / 9, 2 / 9, 4 / 9, 0])


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_top_p_of_zero_is_greedy(top_p: float):
    assert filtered((0.3, 0.4, 0.3), top_p=top_p) == [0, 1, 0]


def test_min_p_keeps_a_share_of_the_most_likely():
    # 0.6 * 0.4 = 0.24: 0.3 stays, 0.2 and 0.1 go.
    assert filtered((0.3, 0.2, 0.4, 0.1), min_p=0.6) == pytest.approx([3 / 7, 0, 4 / 7, 0])


def test_min_p_of_one_keeps_only_the_most_likely():
    assert filtered((0.3, 0.4, 0.3), min_p=1.0) == [0, 1, 0]


def test_filters_follow_the_temperature():
    # Squared: 0.25, 0.09, 0.04 of 0.38, so that the first alone holds 0.66 of the mass.
    assert filtered((0.5, 0.3, 0.2), temperature=0.5, top_p=0.6) == [1, 0, 0]


def test_presence_penalty_counts_a_token_once():
    assert adjusted([1, 2, 3], output=[0, 0, 2], presence_penalty=0.5) == pytest.approx([0.5, 2, 2.5])


def test_frequency_penalty_counts_each_occurrence():
    assert adjusted([1, 2, 3], output=[0, 0, 2], frequency_penalty=0.5) == pytest.approx([0, 2, 2.5])


def test_presence_and_frequency_add_up_and_leave_the_prompt_out():
    # Token 0: 1 - (0.5 + 2 * 0.25); token 1 stands in the prompt only.
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    assert adjusted([1, 2, 3], prompt=[1], output=[0, 0], **penalties) == pytest.approx([0, 2, 3])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output():
    changed = adjusted([3, -3, 3, -3], prompt=[0], output=[1, 1], repetition_penalty=1.5)
    assert changed == pytest.approx([2, -4.5, 3, -3])


def test_logit_bias_is_added():
    assert adjusted([1, 2, 3], logit_bias={0: 5.0, 2: -100.0}) == [6, 2, -97]


def test_an_end_is_impossible_before_min_tokens():
    assert adjusted([1, 2, 3], output=[0], eos_ids=frozenset({1, 2}), min_tokens=2) == [1, -math.inf, -math.inf]


def test_an_end_is_possible_from_min_tokens_on():
    assert adjusted([1, 2, 3], output=[0, 0], eos_ids=frozenset({1, 2}), min_tokens=2) == [1, 2, 3]


def test_a_bias_cannot_bring_an_end_back_before_min_tokens():
    assert adjusted([1, 2], eos_ids=frozenset({1}), min_tokens=1, logit_bias={1: 100})[1] == -math.inf


def test_the_models_logits_stay_as_they_are():
    logits = torch.tensor([1.0, 2.0, 3.0])
    adjust(logits, SamplingParams(logit_bias={0: 5}, frequency_penalty=1), (), [1], NO_EOS)
    assert logits.tolist() == [1, 2, 3]


def test_half_precision_logits_are_drawn_in_float32():
    assert adjust(torch.zeros(3, dtype=torch.bfloat16), GREEDY, (), (), NO_EOS).dtype == torch.float32


def test_draws_come_as_often_as_the_distribution_says():
    # 4,000 draws at p = 0.5, 0.3, 0.2: the widest standard error is 0.008, the tolerance five of them.
    counts = Counter(drawn(logits_of(0.5, 0.3, 0.2), SamplingParams(seed=7), 4000))
    assert [counts[token] / 4000 for token in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_a_removed_token_is_never_drawn():
    assert set(drawn(logits_of(0.4, 0.35, 0.25), SamplingParams(seed=3, top_k=2), 500)) == {0, 1}


def test_the_same_seed_gives_the_same_tokens_whatever_else_draws():
    params, logits = SamplingParams(seed=11), torch.zeros(100)
    alone = drawn(logits, params, 20)
    generator, other = generator_for(params), generator_for(SamplingParams(seed=12))
    beside = []
    for _ in range(20):
        torch.rand(3)
        draw(logits, params, other)
        beside.append(draw(logits, params, generator).token_id)
    assert beside == alone


def test_different_seeds_and_choices_differ():
    logits = torch.zeros(100)
    texts = {
        tuple(draw(logits, params, generator).token_id for _ in range(10))
        for params, index in [(SamplingParams(seed=1), 0), (SamplingParams(seed=1), 1), (SamplingParams(seed=9), 0)]
        for generator in [generator_for(params, index)]
    }
    assert len(texts) == 3


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, -(2**63), 2**64])
def test_every_integer_is_a_seed(seed: int):
    params = SamplingParams(seed=seed)
    assert drawn(torch.zeros(50), params, 5) == drawn(torch.zeros(50), params, 5)


def test_without_a_seed_draws_differ():
    # Two times 20 of 1,000 equal tokens agree once in 10^60.
    assert drawn(torch.zeros(1000), SamplingParams(), 20) != drawn(torch.zeros(1000), SamplingParams(), 20)


def test_logprobs_are_those_of_the_model_before_any_change():
    params = SamplingParams(temperature=0.5, logit_bias={2: 100}, top_logprobs=2)
    token_id, logprob, top = draw(logits_of(0.5, 0.3, 0.2), params, generator_for(params))
    assert token_id == 2
    assert logprob == pytest.approx(math.log(0.2))
    assert [token for token, _ in top] == [0, 1]
    assert [value for _, value in top] == pytest.approx([math.log(0.5), math.log(0.3)])


def test_no_logprobs_unless_asked_for():
    assert draw(logits_of(0.5, 0.5), GREEDY, generator_for(GREEDY))[1:] == (None, ())


def test_zero_top_logprobs_report_the_drawn_token_alone():
    params = SamplingParams(temperature=0, top_logprobs=0)
    assert draw(logits_of(0.6, 0.4), params, generator_for(params)).top == ()


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("side", ["low", "high", "nan"])
def test_a_value_outside_its_range_names_the_field_and_what_is_allowed(name: str, side: str):
    low, high = RANGES[name]
    value = {"low": low - 1, "high": high + 1, "nan": math.nan}[side]
    with pytest.raises(InvalidRequest, match=f"{name} must be between") as raised:
        SamplingParams(**{name: value})
    assert raised.value.param == name
    assert str(value) in str(raised.value)
    assert f"{low:g}" in str(raised.value)


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_every_range_are_allowed(name: str):
    for value in RANGES[name]:
        assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize("bias", [100.1, -101, math.nan, math.inf])
def test_a_bias_outside_its_range_names_token_and_field(bias: float):
    with pytest.raises(InvalidRequest, match=r"logit_bias\[5\] must be between -100 and 100") as raised:
        SamplingParams(logit_bias={5: bias})
    assert raised.value.param == "logit_bias"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_first_of_equals_with_and_without_a_copy(dtype):
    generator = torch.Generator().manual_seed(0)
    for number in range(200):
        logits = torch.randint(-3, 4, (97,), generator=generator).to(dtype)
        if number % 10 == 0:
            logits[number % 97] = torch.nan
        found = draw(logits, GREEDY, torch.Generator()).token_id
        assert found == int(adjust(logits, GREEDY, (), (), frozenset()).argmax())
