"""Products in float32 of what is in bfloat16, on processors that have no other."""

import copy

import pytest
import torch
from torch import nn

from model import widening
from model.testing import tiny_lm
from model.widening import FEW, widen

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture
def _has_no_products(monkeypatch):
    monkeypatch.setattr(widening, "_has_products", lambda: False)


@pytest.mark.usefixtures("_has_no_products")
@pytest.mark.parametrize("num_rows", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_floats_rounded_once(num_rows, has_bias):
    layer = nn.Linear(32, 48, bias=has_bias, dtype=torch.bfloat16)
    x = torch.randn(num_rows, 32).bfloat16()
    plain = copy.deepcopy(layer).float()
    widen(layer)
    with torch.inference_mode():
        expected = plain(x.float())
        found = layer(x)
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.float(), expected, rtol=2**-7, atol=1e-3)
        if num_rows > FEW:
            assert torch.equal(found, expected.bfloat16())


@pytest.mark.usefixtures("_has_no_products")
def test_gradients_reach_what_is_learned_through_autocast_and_in_its_precision():
    layer, narrow = nn.Linear(32, 48), nn.Linear(32, 48)
    narrow.load_state_dict(layer.state_dict())
    widen(layer)
    x = torch.randn(40, 32)
    for some in (layer, narrow):
        with torch.autocast("cpu", torch.bfloat16):
            found = some(x)
        assert found.dtype == torch.bfloat16
        found.float().square().mean().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(layer.weight.grad, narrow.weight.grad, atol=1e-2 * float(narrow.weight.grad.abs().max()))


@pytest.mark.usefixtures("_has_no_products")
def test_a_model_gives_the_same_logits_and_floats_are_left_alone():
    model = tiny_lm()
    with torch.inference_mode():
        expected = model(IDS).logits
        widen(model)
        assert torch.equal(model(IDS).logits, expected)
        narrow = model.to(torch.bfloat16)
        assert torch.allclose(narrow(IDS).logits.float(), expected, atol=5e-2)


def test_a_processor_with_products_in_bfloat16_keeps_them(monkeypatch):
    monkeypatch.setattr(widening, "_has_products", lambda: True)
    layer = nn.Linear(4, 4)
    widen(layer)
    assert "forward" not in vars(layer)
