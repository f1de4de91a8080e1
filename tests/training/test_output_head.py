"""Logits of learned tokens alone."""

import torch
from peft import LoraConfig, get_peft_model

from model.testing import tiny_lm
from training.output_head import predicting


def test_the_logits_are_those_before_each_learned_token_row_by_row() -> None:
    model = tiny_lm()
    ids = torch.randint(3, 250, (3, 7), generator=torch.Generator().manual_seed(0))
    is_learned = torch.zeros(3, 7, dtype=torch.bool)
    is_learned[0, 3:6], is_learned[2, 6] = True, True
    everything = model(ids).logits
    with predicting(model, is_learned):
        found = model(ids).logits
    expected = torch.stack([everything[0, 2], everything[0, 3], everything[0, 4], everything[2, 5]])
    assert torch.allclose(found, expected, atol=1e-6)
    assert model(ids).logits.shape == everything.shape  # afterwards as before


def test_where_nothing_is_learned_there_are_no_logits_and_no_gradient() -> None:
    model = get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear"))
    with predicting(model, torch.zeros(2, 5, dtype=torch.bool)):
        logits = model(torch.full((2, 5), 7)).logits
    assert len(logits) == 0
    logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
