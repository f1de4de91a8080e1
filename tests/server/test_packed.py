"""Packed weights: the same numbers."""

import ctypes
import os
import shutil

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from model.testing import FAMILIES, tiny_lm
from model.widening import has_products
from server.engine import packed
from server.engine.int8 import READ_BYTES, in_levels
from server.engine.library import library, processor
from server.engine.native import FLOATS, PAIRS, multiply_of
from server.engine.packed import BLOCK, PackedLinear, Product, in_blocks, pack

IDS = torch.tensor([[5, 6, 7, 8, 9]])


NO_PRODUCT = "no compiler, or a processor without a product in bfloat16"
HAS_ONEDNN = has_products()


@pytest.fixture(params=["multiply.c", "oneDNN"])
def who(request, monkeypatch):
    """Both kinds of product, where there are both."""
    if request.param == "oneDNN":
        monkeypatch.setattr(packed, "multiply_of", lambda: None)
    elif multiply_of() is None:
        pytest.skip(NO_PRODUCT)
    if request.param == "oneDNN" and not HAS_ONEDNN:
        pytest.skip("oneDNN has no product in bfloat16 for this processor")
    return request.param


def test_a_processor_that_multiplies_pairs_or_floats_does():
    known = set(processor().split())
    has_product = PAIRS in known or known >= FLOATS
    assert (multiply_of() is not None) is (has_product and shutil.which(os.environ.get("CC", "cc")) is not None)


@pytest.mark.skipif(multiply_of() is None, reason=NO_PRODUCT)
@pytest.mark.parametrize("num_rows", [*range(1, 14), 24, 25, 100])
@pytest.mark.parametrize(("num_in", "num_out"), [(2, 32), (576, 960), (30, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_row_has_its_product_and_the_same_beside_others(num_rows, num_in, num_out, has_bias):
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = (torch.randn(n, num_in, generator=generator).bfloat16() for n in (num_rows, num_out))
    bias = torch.randn(num_out, generator=generator).bfloat16() if has_bias else None
    expected = linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = torch.ops.ballast.multiply(x, in_blocks(weight), bias)
    size = linear(x.double().abs(), weight.double().abs()).max()
    assert (found.double() - expected).abs().max() <= 2**-8 * expected.abs().max() + 1e-6 * size
    alone = torch.cat([torch.ops.ballast.multiply(row[None], in_blocks(weight), bias) for row in x])
    assert torch.equal(found, alone)


@pytest.mark.skipif(not set(processor().split()) >= FLOATS, reason="a processor of another kind")
@pytest.mark.parametrize("num_rows", [*range(1, 8), 12, 23])
@pytest.mark.parametrize("name", ["multiply", "multiply_int8"])
def test_without_avx512_products_are_the_same(name, num_rows, monkeypatch):
    monkeypatch.setenv("CC", f"{os.environ.get('CC', 'cc')} -mno-avx512f")
    plain = library.__wrapped__(name)
    if plain is None:
        pytest.skip("no compiler")
    generator = torch.Generator().manual_seed(num_rows)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).bfloat16() for shape in ((num_rows, 70), (64, 70), (64,))
    )
    found, read = (
        torch.empty(num_rows, 64, dtype=torch.bfloat16),
        torch.empty(num_rows, 2, READ_BYTES, dtype=torch.uint8),
    )
    laid = in_blocks(weight) if name == "multiply" else in_levels(weight)
    tensors = (x, laid, bias, found) if name == "multiply" else (x, laid, bias, found, read)
    plain[name](*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), *map(ctypes.c_int64, (num_rows, 70, 64)))
    expected = linear(x.float(), weight.float(), bias.float())
    error = 2**-8 if name == "multiply" else 2**-5
    assert (found.float() - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.skipif(multiply_of() is None, reason=NO_PRODUCT)
def test_two_threads_give_what_one_gives():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (25, 160))
    expected = torch.ops.ballast.multiply(x, in_blocks(weight), None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(torch.ops.ballast.multiply(x, in_blocks(weight), None), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(multiply_of() is None, reason=NO_PRODUCT)
def test_a_weight_in_blocks_is_that_weight():
    weight = torch.arange(2 * BLOCK * 6).reshape(2 * BLOCK, 6)
    blocks = in_blocks(weight)
    assert blocks.shape == (2, 3, BLOCK, 2)
    assert blocks[1, 2, 5].tolist() == weight[BLOCK + 5, 4:6].tolist()


@pytest.mark.usefixtures("who")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_gives_the_same_logits(family: str):
    model = tiny_lm(family).to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(IDS).logits
        num_linear = sum(type(module) is nn.Linear for module in model.modules())
        num_products = pack(model, lambda: model(IDS))
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == num_linear
        num_layers = model.config.num_hidden_layers
        # gpt_neox has parallel branches, each in a module of its own; phi3 has side by side what others have not.
        is_fused = family in ("phi3", "gpt_neox")
        assert num_products == (num_linear if is_fused else num_linear - 3 * num_layers)
        assert torch.allclose(model(IDS).logits.float(), expected.float(), atol=2e-2)
    assert model.get_input_embeddings().weight.shape[0] == 259


def test_a_weight_that_nothing_packs_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(packed, "has_products", lambda: False)
    even, odd = (nn.Linear(size, 32, dtype=torch.bfloat16) for size in (16, 15))
    model = tiny_lm().to(torch.bfloat16)
    model.some = nn.ModuleList([even, odd])
    pack(model, lambda: model(IDS))
    assert type(model.some[1]) is nn.Linear
    assert (type(model.some[0]) is PackedLinear) is (multiply_of() is not None)


def test_a_model_in_float32_is_left_as_it_is():
    model = tiny_lm()
    assert pack(model, lambda: model(IDS)) == 0
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.usefixtures("who")
@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_of_one_product_give_their_own_parts_whoever_asks_first_and_of_whatever_they_read(has_bias):
    layers = [nn.Linear(16, size, bias=has_bias, dtype=torch.bfloat16) for size in (32, 16, 41)]
    one, other = torch.randn(2, 3, 16).bfloat16()
    with torch.inference_mode():
        product = Product(layers)
        packed = [PackedLinear(layer, product, number) for number, layer in enumerate(layers)]
        for number, x in ((2, one), (0, one), (1, one), (1, other), (0, one), (0, other), (2, other), (1, other)):
            assert torch.allclose(packed[number](x).float(), layers[number](x).float(), atol=2e-2)
        assert product._read is None
