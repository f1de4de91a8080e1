"""The objectives, against values worked out by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.objectives import (
    IGNORED,
    betas,
    constrained_loss,
    constraint_weights,
    divergences,
    positions,
    recovery_depth,
    share_weights,
    token_logprobs,
)


def test_the_log_probability_of_a_token_is_that_of_the_logits_before_it() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    assert token_logprobs(logits, torch.tensor([1, 0])).tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2)])


def test_log_probabilities_of_bfloat16_logits_are_float32() -> None:
    assert token_logprobs(torch.randn(2, 5).bfloat16(), torch.tensor([1, 2])).dtype is torch.float32


def test_the_divergence_from_a_reference_has_its_hand_computed_value() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    reference = torch.tensor([[7.0, 7.0], [2.0, 2.0]])
    expected = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), 0.0]
    assert divergences(logits, reference).tolist() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_the_divergence_is_the_mean_one_of_the_cross_entropy_over_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, generator=generator, requires_grad=True)
    reference = torch.randn(1, 3, generator=generator)
    expected = torch.zeros(1, 3)
    for token, probability in enumerate(reference[0].softmax(dim=0)):
        (gradient,) = torch.autograd.grad(-token_logprobs(logits, torch.tensor([token])).sum(), logits)
        expected += probability * gradient
    divergences(logits, reference).sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_positions_count_from_the_first_learned_token_under_padding_on_either_side() -> None:
    labels = torch.tensor([[IGNORED, IGNORED, 7, 8, 9], [IGNORED, 4, 5, IGNORED, IGNORED]])
    assert positions(labels).tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 0, 0]]


def test_half_of_the_recovery_depths_are_zero_and_the_others_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [recovery_depth(1000, generator) for _ in range(20_000)]
    assert sum(k == 0 for k in drawn) / len(drawn) == pytest.approx(0.5, abs=0.02)
    deep = [k for k in drawn if k]
    assert (min(deep), max(deep)) == (1, 100)
    assert sum(deep) / len(deep) == pytest.approx(50.5, abs=1.0)


def test_a_short_harmful_answer_caps_the_depth() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {recovery_depth(3, generator, probability=1.0) for _ in range(200)}
    assert drawn == {1, 2, 3}


def test_without_a_harmful_answer_the_depth_is_zero() -> None:
    assert recovery_depth(0, torch.Generator(), probability=1.0) == 0


def test_each_part_weighs_its_share_whatever_its_length() -> None:
    counts = torch.tensor([10.0, 400.0])
    weights = share_weights(counts, torch.tensor([0.2, 0.8]))
    assert (weights * counts).tolist() == pytest.approx([0.2, 0.8])


def test_a_part_without_tokens_weighs_nothing() -> None:
    assert share_weights(torch.tensor([0.0, 4.0]), torch.tensor([0.2, 0.8])).tolist() == pytest.approx([0.0, 0.2])


def test_the_deepening_loss_is_the_published_sum_of_two_means() -> None:
    recovery, anchor = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0, 6.0, 8.0])  # negative log-likelihoods
    weight = share_weights(torch.tensor([2.0, 4.0]), torch.tensor([0.2, 0.8]))
    loss = (weight[0] * recovery).sum() + (weight[1] * anchor).sum()
    assert loss.item() == pytest.approx(0.2 * 2.0 + 0.8 * 5.0)


def test_beta_is_the_published_one_at_every_position() -> None:
    found = betas(torch.tensor([1, 2, 3, 4, 5, 6, 100]))
    assert found.tolist() == pytest.approx([0.5, 2, 2, 2, 2, 0.1, 0.1])


@pytest.mark.parametrize(
    ("beta", "delta", "weight"),
    [
        (0.1, -3.0, 1.149),
        (0.1, 10.0, 0.538),
        (0.5, 2.0, 0.538),
        (0.5, 16.0, 0.0007),
        (2.0, -1.0, 1.762),
        (2.0, 2.0, 0.036),
    ],
)
def test_the_constraint_weighs_as_computed_by_hand(beta: float, delta: float, weight: float) -> None:
    found = constraint_weights(torch.tensor(delta), torch.tensor(0.0), torch.tensor(beta))
    assert found.item() == pytest.approx(weight, abs=5e-4)


def test_the_constrained_loss_has_its_hand_computed_value() -> None:
    found = constrained_loss(torch.tensor(-1.0), torch.tensor(-1.0), torch.tensor(0.5))
    assert found.item() == pytest.approx(4 * math.log(2))


def _random_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(10, 11, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(0, 11, (10,), generator=generator)
    reference = -3 * torch.rand(10, generator=generator)
    return logits, tokens, reference, betas(1 + torch.arange(10))


def test_the_gradient_of_the_constrained_loss_is_the_weighted_one_of_the_cross_entropy() -> None:
    logits, tokens, reference, beta = _random_case()
    logprobs = token_logprobs(logits, tokens)
    (gradient,) = torch.autograd.grad(constrained_loss(logprobs, reference, beta).sum(), logits)
    weights = constraint_weights(logprobs.detach(), reference, beta)
    surrogate = (weights * -token_logprobs(logits, tokens)).sum()
    (expected,) = torch.autograd.grad(surrogate, logits)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_at_the_start_the_gradient_is_that_of_the_cross_entropy() -> None:
    logits, tokens, _, beta = _random_case()
    logprobs = token_logprobs(logits, tokens)
    (gradient,) = torch.autograd.grad(constrained_loss(logprobs, logprobs.detach(), beta).sum(), logits)
    plain = cross_entropy(logits, tokens, reduction="sum")
    (expected,) = torch.autograd.grad(plain, logits)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_a_tiny_beta_gives_the_cross_entropy_but_for_a_constant() -> None:
    logprobs, reference = torch.tensor([-1.0, -5.0]).double(), torch.tensor([-2.0, -2.0]).double()
    found = constrained_loss(logprobs, reference, torch.tensor(1e-4).double())
    assert (found[1] - found[0]).item() == pytest.approx(4.0, abs=1e-2)


def test_a_huge_beta_forbids_only_to_fall_below_the_reference() -> None:
    logprobs, reference = torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -2.0])
    assert constrained_loss(logprobs, reference, torch.tensor(1e4)).tolist() == pytest.approx([0.0, 6.0], abs=1e-3)
