"""Packed weights: the same numbers."""

import pytest
import torch

from model.testing import FAMILIES, tiny_lm
from server.engine.packed import PackedLinear, pack

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_gives_the_same_logits(family: str):
    model = tiny_lm(family).to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(IDS).logits
        num_packed = pack(model)
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            assert num_packed == 0
            return
        assert num_packed >= 3 * 4
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == num_packed
        assert torch.allclose(model(IDS).logits.float(), expected.float(), atol=2e-2)
    assert model.get_input_embeddings().weight.shape[0] == 259


def test_a_model_in_float32_is_left_as_it_is():
    model = tiny_lm()
    assert pack(model) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
