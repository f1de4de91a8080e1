"""Packed weights: the same numbers."""

import pytest
import torch
from torch import nn

from model.testing import FAMILIES, tiny_lm
from server.engine.packed import PackedLinear, Product, pack

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_gives_the_same_logits(family: str):
    model = tiny_lm(family).to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(IDS).logits
        num_linear = sum(type(module) is nn.Linear for module in model.modules())
        num_products = pack(model, lambda: model(IDS))
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert num_products == 0
            return
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == num_linear
        num_layers = model.config.num_hidden_layers
        # gpt_neox has parallel branches, each in a module of its own; phi3 has side by side what others have not.
        is_fused = family in ("phi3", "gpt_neox")
        assert num_products == (num_linear if is_fused else num_linear - 3 * num_layers)
        assert torch.allclose(model(IDS).logits.float(), expected.float(), atol=2e-2)
    assert model.get_input_embeddings().weight.shape[0] == 259


def test_a_model_in_float32_is_left_as_it_is():
    model = tiny_lm()
    assert pack(model, lambda: model(IDS)) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products here")
def test_layers_of_one_product_give_their_own_parts_whoever_asks_first_and_of_whatever_they_read():
    layers = [nn.Linear(16, size, bias=True, dtype=torch.bfloat16) for size in (32, 16, 48)]
    one, other = torch.randn(2, 3, 16).bfloat16()
    with torch.inference_mode():
        product = Product(layers)
        packed = [PackedLinear(layer, product, number) for number, layer in enumerate(layers)]
        for number, x in ((2, one), (0, one), (1, one), (1, other), (0, one), (0, other), (2, other), (1, other)):
            assert torch.allclose(packed[number](x).float(), layers[number](x).float(), atol=2e-2)
        assert product._read is None
