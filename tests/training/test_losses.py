"""The losses against numbers worked out by hand."""

import math

import pytest
import torch

from training.config import Loss
from training.losses import request_loss, response_loss, softmax_weighted_loss

LN2, LN3 = math.log(2), math.log(3)


def test_a_request_counts_by_its_weight():
    """At logit 0 the loss is ln 2; at logit ln 3 the risk is 3/4, so benign costs -ln(1/4) and harmful -ln(3/4)."""
    losses = request_loss(
        torch.tensor([0.0, LN3, LN3, 9.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 1.0, 0.0])
    )
    assert losses.tolist() == pytest.approx([2 * LN2, math.log(4), math.log(4 / 3), 0.0])


def test_softmax_weights_favour_the_confident_position():
    """Logits 0 and ln 3: weights 1/4 and 3/4; losses ln 2 and ln(4/3) if harmful, ln 2 and ln 4 if benign."""
    logits = torch.tensor([[0.0, LN3], [0.0, LN3]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    losses = softmax_weighted_loss(logits, mask, torch.tensor([1.0, 0.0]), tau=1.0, is_weight_detached=True)
    assert losses.tolist() == pytest.approx(
        [LN2 / 4 + 3 * math.log(4 / 3) / 4, LN2 / 4 + 3 * math.log(4) / 4], rel=1e-6
    )


def test_tau_flattens_the_weights():
    """Logits 0 and 2 ln 3 at tau 2 weigh as 0 and ln 3 do at tau 1; the risks are 1/2 and 9/10."""
    logits = torch.tensor([[0.0, 2 * LN3]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = softmax_weighted_loss(logits, mask, torch.tensor([0.0]), tau=2.0, is_weight_detached=True)
    assert loss.item() == pytest.approx(LN2 / 4 + 3 * math.log(10) / 4, rel=1e-6)


def test_a_benign_opening_of_a_harmful_response_costs_next_to_nothing():
    logits = torch.tensor([[-8.0, -8.0, -8.0, 8.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    harmful = softmax_weighted_loss(logits, mask, torch.tensor([1.0]), tau=1.0, is_weight_detached=True)
    benign = softmax_weighted_loss(logits, mask, torch.tensor([0.0]), tau=1.0, is_weight_detached=True)
    assert harmful.item() < 0.001
    assert benign.item() > 7.9


def test_padding_and_rows_without_positions_cost_nothing():
    logits = torch.tensor([[0.0, 50.0], [7.0, 7.0]])
    mask = torch.tensor([[True, False], [False, False]])
    loss = softmax_weighted_loss(logits, mask, torch.zeros(2), tau=1.0, is_weight_detached=False)
    assert loss.tolist() == pytest.approx([LN2, 0.0])


def test_detached_weights_send_the_gradient_through_the_loss_alone():
    """Weights 1/4 and 3/4; d BCE / dz of a benign row is the risk: 1/2 and 3/4."""
    logits = torch.tensor([[0.0, LN3]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    softmax_weighted_loss(logits, mask, torch.tensor([0.0]), tau=1.0, is_weight_detached=True).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([1 / 8, 9 / 16])


def test_the_response_loss_is_the_weighted_sum_of_both_terms():
    """Smoothing 1/2 over logits 0 and 2 ln 3 gives 0 and ln 3. Only position 2 counts in the softmax term: ln 4.
    The mean term has ln 2 and -ln(1/10)."""
    settings = Loss(softmax_weight=2.0, mean_weight=0.5, first_position=2)
    loss = response_loss(
        torch.tensor([[0.0, 2 * LN3, 99.0]]),
        torch.tensor([[True, True, False]]),
        torch.tensor([0.0]),
        torch.tensor([3.0]),
        settings,
        smoothing=0.5,
    )
    assert loss.item() == pytest.approx(3 * (2 * math.log(4) + 0.5 * (LN2 + math.log(10)) / 2), rel=1e-6)


def test_positions_before_a_turn_have_no_loss_of_their_own_and_the_first_position_is_counted_after_it():
    """Logits 9 stand before the turn. Of 0 and ln 3 after it the softmax term counts the second, the mean both."""
    settings = Loss(softmax_weight=2.0, mean_weight=0.5, first_position=2)
    loss = response_loss(
        torch.tensor([[9.0, 9.0, 0.0, LN3, 99.0]]),
        torch.tensor([[False, False, True, True, False]]),
        torch.tensor([0.0]),
        torch.tensor([1.0]),
        settings,
        smoothing=1.0,
    )
    assert loss.item() == pytest.approx(2 * math.log(4) + 0.5 * (LN2 + math.log(4)) / 2, rel=1e-6)


def test_a_response_shorter_than_the_first_position_counts_by_its_last_token():
    settings = Loss(softmax_weight=1.0, mean_weight=0.0, first_position=9)
    loss = response_loss(
        torch.tensor([[5.0, LN3]]),
        torch.tensor([[True, True]]),
        torch.tensor([0.0]),
        torch.tensor([1.0]),
        settings,
        smoothing=1.0,
    )
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
