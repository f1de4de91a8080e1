"""Products in float32 of what is in bfloat16, on processors that have no other."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from model import widening
from model.testing import tiny_lm
from model.widening import FEW, WidenedLinear, widen

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def some(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(num_in, num_out, *, has_bias=True, dtype=torch.float32):
    layer = nn.Linear(num_in, num_out, bias=has_bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(some(num_out, num_in, seed=1))
        if has_bias:
            layer.bias.copy_(some(num_out, seed=2))
    return layer


@pytest.fixture
def widened(monkeypatch):
    """The precisions of all products that are widened, on a processor that has no others."""
    found = []

    def recorded(x, weight, bias):
        found.append((x.dtype, weight.dtype))
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(widening, "has_products", lambda: False)
    monkeypatch.setattr(widening, "linear", recorded)
    return found


@pytest.mark.parametrize("num_rows", [1, FEW, FEW + 1, 40])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_of_more_than_a_few_rows_are_those_of_floats_rounded_once(num_rows, has_bias, widened):
    layer = layer_of(32, 48, has_bias=has_bias, dtype=torch.bfloat16)
    x, plain = some(num_rows, 32, seed=0).bfloat16(), copy.deepcopy(layer).float()
    widen(layer)
    with torch.inference_mode():
        found, expected = layer(x), plain(x.float())
    assert found.dtype == torch.bfloat16
    if num_rows > FEW:
        assert torch.equal(found, expected.bfloat16())
    assert torch.allclose(found.float(), expected, rtol=2**-7, atol=1e-2)
    assert widened == [(torch.float32, torch.float32)] * (num_rows > FEW)


def test_floats_are_left_alone_and_mixed_precisions_an_error_as_ever(widened):
    layer = layer_of(32, 48)
    widen(layer)
    layer(some(40, 32, seed=0))
    assert widened == []
    for num_rows in (2, 40):
        with pytest.raises(RuntimeError, match="dtype"):
            layer(some(num_rows, 32, seed=0).bfloat16())


@pytest.mark.parametrize("shape", [(40, 32), (4, 10, 32)])
def test_gradients_through_autocast_are_those_of_a_plain_layer(shape, widened):
    layer = layer_of(32, 48)
    plain = copy.deepcopy(layer)
    widen(layer)
    gradients = []
    for some_layer in (layer, plain):
        x = some(*shape, seed=0).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = some_layer(x)
        assert found.dtype == torch.bfloat16
        found.float().square().mean().backward()
        gradients.append((x.grad, some_layer.weight.grad, some_layer.bias.grad))
    assert len(widened) == 1
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert torch.allclose(ours, theirs, rtol=0.05, atol=2e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_is_kept_in_float32_for_the_gradients(dtype, widened):
    layer = layer_of(32, 48, dtype=torch.bfloat16).requires_grad_(False)
    widen(layer)
    x = some(40, 32, seed=0).to(dtype).requires_grad_()
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.dtype) or tensor, lambda kept: kept),
    ):
        found = layer(x)
    assert set(kept) == {torch.bfloat16}
    found.float().sum().backward()
    assert torch.allclose(x.grad.float(), layer.weight.float().sum(0).expand(40, -1), rtol=2**-7, atol=1e-2)
    assert layer.weight.grad is None


def test_an_adapter_multiplies_so_too(widened):
    model = get_peft_model(tiny_lm().to(torch.bfloat16), LoraConfig(target_modules="all-linear"))
    widen(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
    assert len(widened) == sum(isinstance(module, nn.Linear) for module in model.modules())


def test_a_widened_model_can_be_copied_and_gives_the_same_logits(widened):
    model = tiny_lm().to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(IDS).logits.float()
        widen(model)
        assert torch.allclose(model(IDS).logits.float(), expected, atol=5e-2)
    assert type(copy.deepcopy(model.get_output_embeddings())) is WidenedLinear
    assert type(pickle.loads(pickle.dumps(model.get_output_embeddings()))) is WidenedLinear
    assert widened


def test_a_processor_with_products_in_bfloat16_keeps_them(monkeypatch):
    monkeypatch.setattr(widening, "has_products", lambda: True)
    layer = layer_of(4, 4)
    widen(layer)
    assert type(layer) is nn.Linear
