"""Weights in 8 bits: exactly the product of what is rounded, and a server that says where it cannot have them."""

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from model.testing import FAMILIES, tiny_guarded_lm, tiny_lm, write_tiny
from server import loading
from server.__main__ import serve
from server.engine.int8 import INPUTS, OUTPUTS, WEIGHT_BYTES, in_levels, levels_of
from server.engine.library import processor
from server.engine.native import FLOATS, FOURS, PAIRS, multiply_int8_of, multiply_of
from server.engine.packed import PackedLinear, Product, pack
from server.engine.paged import _rounded, paged
from server.engine.runner import PagedRunner
from server.engine.tape import Tape
from server.loading import load_model
from server.settings import ConfigurationError, Settings
from tests.server.together import NEVER, OFTEN, SIGNALS, requests, together, told

IDS = torch.tensor([[5, 6, 7, 8, 9]])
NEEDS_8_BITS = pytest.mark.skipif(multiply_int8_of() is None, reason="no compiler, or no products in 8 bits")


def rounded(x):
    """Return x (N, in) with each block of a row rounded to 127 levels on each side, in double precision."""
    blocks = pad(x.float(), (0, -x.shape[1] % INPUTS)).view(len(x), -1, INPUTS)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)  # not 127 / largest, which rounds twice
    levels = (blocks * inverse).round()
    return (levels.double() * (largest / 127).double()).flatten(1)[:, : x.shape[1]]


def some(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_a_processor_that_knows_how_has_products_in_8_bits():
    known = set(processor().split())
    knows_how = known >= {PAIRS, FOURS} or known >= FLOATS
    assert (multiply_int8_of() is not None) is (knows_how and multiply_of() is not None)


@NEEDS_8_BITS
@pytest.mark.parametrize("num_rows", [*range(1, 10), 16, 17, 100])
@pytest.mark.parametrize(("num_in", "num_out"), [(1, 32), (64, 32), (65, 64), (576, 960), (30, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_row_has_the_product_of_what_is_rounded_and_the_same_beside_others(num_rows, num_in, num_out, has_bias):
    x, weight = some(num_rows, num_in, seed=num_rows), some(num_out, num_in, seed=num_in)
    bias = some(num_out, seed=2) if has_bias else None
    levels, scales = levels_of(weight)
    exact = (levels.double() * scales.double()[..., None]).flatten(1)[:, :num_in]
    expected = rounded(x) @ exact.T + (0 if bias is None else bias.double())
    found = torch.ops.ballast.multiply_int8(x, in_levels(weight), bias)
    size = (x.double().abs() @ weight.double().abs().T).max()
    # The result is rounded to bfloat16, half of its last place at most; sums are in float32.
    assert ((found.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * size).all()
    alone = torch.cat([torch.ops.ballast.multiply_int8(row[None], in_levels(weight), bias) for row in x])
    assert torch.equal(found, alone)


@NEEDS_8_BITS
def test_the_largest_levels_fit_into_sums():
    x, weight = torch.ones(3, 1536).bfloat16(), torch.ones(32, 1536).bfloat16()
    for sign in (1, -1):
        assert torch.ops.ballast.multiply_int8(x, in_levels(sign * weight), None).unique().tolist() == [sign * 1536]
        assert torch.ops.ballast.multiply_int8(sign * x, in_levels(weight), None).unique().tolist() == [sign * 1536]


@NEEDS_8_BITS
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_what_is_not_finite_is_not_rounded_to_what_is_and_other_rows_keep_theirs(value, place):
    x, weight = some(3, 100, seed=0), in_levels(some(64, 100, seed=1))
    expected = torch.ops.ballast.multiply_int8(x, weight, None)
    x[1, place] = value
    found = torch.ops.ballast.multiply_int8(x, weight, None)
    assert not found[1].isfinite().any()
    assert torch.equal(found[::2], expected[::2])


@NEEDS_8_BITS
def test_a_weight_that_is_no_number_gives_none():
    weight = some(64, 100, seed=1)
    weight[3, 40] = torch.nan
    found = torch.ops.ballast.multiply_int8(some(3, 100, seed=0), in_levels(weight), None)
    assert found[:, 3].isnan().all()
    assert found.isnan().sum() == 3


@NEEDS_8_BITS
def test_zeros_give_the_bias():
    x, weight, bias = torch.zeros(2, 70).bfloat16(), some(32, 70, seed=1), some(32, seed=2)
    assert torch.equal(torch.ops.ballast.multiply_int8(x, in_levels(weight), bias), bias.expand(2, -1))
    assert torch.equal(torch.ops.ballast.multiply_int8(x + 1, in_levels(0 * weight), bias), bias.expand(2, -1))


def test_a_weight_in_levels_is_that_weight_with_its_scales():
    weight = some(2 * OUTPUTS, 2 * INPUTS + 3, seed=0)
    levels, scales = levels_of(weight)
    laid = in_levels(weight)
    assert laid.shape == (2, 3, WEIGHT_BYTES)
    of_levels, of_scales = laid[1, 2].split([OUTPUTS * INPUTS, OUTPUTS * 4])
    assert torch.equal(
        of_levels.view(INPUTS // 4, OUTPUTS, 4)[:, 5].flatten().short() - 128, levels[OUTPUTS + 5, 2].short()
    )
    assert torch.equal(of_scales.view(torch.float32), scales[OUTPUTS:, 2])
    assert not levels[:, 2, 3:].any()
    back = (levels.float() * scales[..., None]).flatten(1)[:, : weight.shape[1]]
    assert ((back - weight.float()).abs() <= 0.5001 * scales.repeat_interleave(INPUTS, 1)[:, : weight.shape[1]]).all()


@NEEDS_8_BITS
@pytest.mark.parametrize("has_bias", [False, True])
def test_layers_of_one_product_give_their_own_parts(has_bias):
    layers = [nn.Linear(16, size, bias=has_bias, dtype=torch.bfloat16) for size in (32, 16, 41)]
    x = some(3, 16, seed=3)
    with torch.inference_mode():
        product = Product(layers, is_int8=True)
        for number, layer in enumerate(layers):
            assert torch.allclose(PackedLinear(layer, product, number)(x).float(), layer(x).float(), atol=3e-2)
    assert product.weight.dtype == torch.uint8


@NEEDS_8_BITS
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_8_bits_gives_nearly_the_same_logits(family):
    model = tiny_lm(family).to(torch.bfloat16)
    with torch.inference_mode():
        expected = model(IDS).logits.float()
        num_linear = sum(type(module) is nn.Linear for module in model.modules())
        pack(model, lambda: model(IDS), is_int8=True)
        found = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(found) == num_linear
        assert all(module.product.weight.dtype == torch.uint8 for module in found)
        logits = model(IDS).logits.float()
    assert torch.cosine_similarity(logits, expected, dim=-1).min() > 0.999
    assert not torch.equal(logits, expected)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, checkpoint = write_tiny(tmp_path_factory.mktemp("tiny"))
    return {"model": str(model), "checkpoint": str(checkpoint), "dtype": "int8"}


@NEEDS_8_BITS
def test_a_model_to_be_rounded_is_loaded_in_bfloat16_with_a_word_about_its_thresholds(tiny, caplog):
    assert load_model(Settings(**tiny, device="cpu")).model.dtype == torch.bfloat16
    assert "thresholds were calibrated with weights that are not rounded" in caplog.text


def test_8_bits_on_a_gpu_are_an_error_that_names_what_there_is(tiny):
    with pytest.raises(ConfigurationError, match=r"int8 is for device 'cpu', got 'cuda:0'.*bfloat16, float16, float32"):
        load_model(Settings(**tiny, device="cuda:0"))


def test_8_bits_without_such_products_are_an_error_that_says_what_is_needed(tiny, monkeypatch):
    monkeypatch.setattr(loading, "multiply_int8_of", lambda: None)
    with pytest.raises(ConfigurationError, match=r"needs a processor with AVX2 and FMA.*bfloat16, float16") as raised:
        load_model(Settings(**tiny, device="cpu"))
    assert "\n" not in str(raised.value)


def test_another_precision_is_an_error_that_names_those_there_are():
    with pytest.raises(ValueError, match="'auto', 'bfloat16', 'float16', 'float32' or 'int8'"):
        Settings(dtype="int4")


@NEEDS_8_BITS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
def test_passes_in_8_bits_are_recorded_and_give_what_they_give_when_they_run(caplog, monkeypatch):
    lm = tiny_guarded_lm("llama", **SIGNALS["both"] | {"request": NEVER, "response": OFTEN, "onset": 0.4})
    lm.model.to(torch.bfloat16)
    runner = paged(lm, 8 << 20, compiles=True, is_int8=True)
    assert isinstance(runner, PagedRunner)
    assert not [one for one in caplog.records if one.name.startswith("server")]
    assert runner.recorded is not None
    products = [module.product for module in lm.model.modules() if isinstance(module, PackedLinear)]
    assert {product.weight.dtype for product in products} == {torch.uint8}
    asked, counted = requests(lm, 8), []
    runner.reset()
    play = Tape.play
    monkeypatch.setattr(Tape, "play", lambda self: counted.append(play(self)))
    played = [told(events) for events in together(lm, asked, runner)]
    assert len(counted) > 10
    runner.recorded = None
    runner.reset()
    assert played == [told(events) for events in together(lm, asked, runner)]


@pytest.mark.parametrize(("dtype", "is_int8"), [("int8", True), ("bfloat16", False), ("auto", False)])
def test_the_command_has_weights_rounded_if_it_is_told_so(dtype, is_int8, monkeypatch):
    seen = []

    class Process:
        failure = None

        def __init__(self, _, engine):
            seen.append(engine._seat.keywords["is_int8"])

        def serve_at(self, listener):
            listener.close()

    monkeypatch.setattr("server.process.Process", Process)
    monkeypatch.setattr("server.log.configure", lambda _: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")  # so that it sets none
    assert serve(Settings(dtype=dtype, port=0)) == 0
    assert seen == [is_int8]


def test_weights_that_round_badly_are_told_of(caplog):
    before = torch.arange(8.0)
    assert torch.equal(_rounded(before, before + 1, 3), before + 1)  # a mean is no difference
    assert not caplog.records
    _rounded(before, -before, 3)
    assert "change what the model says: its logits have a cosine of -1.000" in caplog.text
    _rounded(before, before, 0)
    assert "no layer of the model could be rounded" in caplog.text
