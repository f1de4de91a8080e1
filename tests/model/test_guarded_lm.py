"""The wrapper on seven families of tiny random models, against plain transformers."""

import logging
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from model.config import TokenHeadConfig
from model.errors import CheckpointError
from model.guarded_lm import GuardedLM
from model.safety_head import Passage, TokenHead
from model.testing import FAMILIES, byte_tokenizer, tiny_config, tiny_guarded_lm, tiny_lm

IDS = [1, *range(60, 90), 7]
"""32 tokens: twice the sliding window of the tiny Mistral and Phi-3."""


FEATURES = torch.ones(2, 2 * 32)
"""What the head of a tiny model reads at two positions."""


class FailingHead(nn.Module):
    """A risk head that raises."""

    def forward(self, features: torch.Tensor) -> None:
        raise RuntimeError(" ".join(["my", "darkest", "thought"]))


def plain_logits(lm: GuardedLM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_the_logits_of_plain_transformers(family: str):
    lm = tiny_guarded_lm(family)
    for num in (0, 1, 32):
        output = lm.forward(IDS, lm.new_cache(), states_of_last=num)
        assert torch.equal(output.logits, plain_logits(lm, IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_gives_the_logits_of_one_pass(family: str):
    lm = tiny_guarded_lm(family)
    cache = lm.new_cache()
    for length, token in enumerate(IDS, start=1):
        logits = lm.forward([token], cache, states_of_last=1).logits
        torch.testing.assert_close(logits, plain_logits(lm, IDS[:length]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cropped_cache_is_as_if_the_rest_had_never_been(family: str):
    lm = tiny_guarded_lm(family)
    cache = lm.new_cache()
    lm.forward(IDS, cache)
    lm.crop(cache, 4)
    logits = lm.forward([9, 8], cache).logits
    torch.testing.assert_close(logits, plain_logits(lm, [*IDS[:4], 9, 8]), atol=1e-5, rtol=1e-4)


def test_a_crop_to_what_is_there_changes_nothing():
    lm = tiny_guarded_lm()
    cache = lm.new_cache()
    lm.forward(IDS, cache)
    lm.crop(cache, len(IDS))
    lm.crop(cache, len(IDS) + 5)
    assert cache.get_seq_length() == len(IDS)


@pytest.mark.parametrize("layers", [(-1,), (0, 1, 2, -1), (3,)])
def test_the_states_are_those_of_the_heads_layers_and_the_head_reads_them(layers: tuple[int, ...]):
    model, tokenizer = tiny_lm(), byte_tokenizer()
    config = tiny_config(model, tokenizer, token_head=TokenHeadConfig(layers, 32, 0))
    head = TokenHead(config.token_head)
    lm = GuardedLM(model, tokenizer, head, config)
    output = lm.forward(IDS, lm.new_cache(), states_of_last=3)
    with torch.inference_mode():
        hidden = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
        states = torch.cat([hidden[layer][0, -3:] for layer in layers], dim=-1)
        features = torch.cat([states, states], dim=-1)
        expected = {"request": head.request(features), "response": head.response(features)}
    torch.testing.assert_close(output.states, states)
    for side, logits in expected.items():
        assert lm.assess(side, features).logits == pytest.approx(logits.tolist(), abs=1e-6)


def test_each_state_is_the_one_at_its_token():
    lm = tiny_guarded_lm()
    every = lm.forward(IDS, lm.new_cache(), states_of_last=len(IDS)).states
    assert every.shape == (len(IDS), 32)
    for num in (1, 5):
        assert torch.equal(lm.forward(IDS, lm.new_cache(), states_of_last=num).states, every[-num:])


def test_states_are_given_only_where_asked():
    lm = tiny_guarded_lm()
    assert lm.forward(IDS, lm.new_cache()).states is None


def test_a_model_without_a_head_gives_logits_alone():
    model = tiny_lm()
    lm = GuardedLM(model, byte_tokenizer())
    assert lm.forward(IDS, lm.new_cache(), states_of_last=1).states is None


@pytest.mark.parametrize("side", ["request", "response"])
def test_a_head_that_raises_gives_nan_and_a_log_line(side, caplog):
    lm = tiny_guarded_lm()
    setattr(lm.head, side, FailingHead())
    with caplog.at_level(logging.ERROR):
        output = lm.forward(IDS, lm.new_cache(), states_of_last=2)
        found = lm.assess(side, Passage().extend(output.states))
    assert [math.isnan(logit) for logit in found.logits] == [True, True]
    assert found.seconds > 0
    assert torch.equal(output.logits, plain_logits(lm, IDS))
    assert "safety head failed" in caplog.text


def test_a_head_that_raises_on_one_side_judges_the_other():
    lm = tiny_guarded_lm()
    lm.head.request = FailingHead()
    assert all(math.isfinite(logit) for logit in lm.assess("response", FEATURES).logits)


def test_the_log_line_of_a_failing_head_says_where_and_repeats_no_message(caplog):
    lm = tiny_guarded_lm()
    lm.head.response = FailingHead()
    with caplog.at_level(logging.ERROR):
        lm.assess("response", FEATURES)
    assert "RuntimeError at " in caplog.text
    assert "test_guarded_lm.py:" in caplog.text
    assert "my darkest" not in caplog.text


class Pending:
    """A tensor that a GPU is still computing: it takes 20 ms to come to the CPU."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def to(self, device: str) -> torch.Tensor:
        assert device == "cpu"
        time.sleep(0.02)
        return self.value

    def tolist(self) -> list[float]:
        return self.to("cpu").tolist()


def test_the_time_of_the_head_lasts_until_its_logits_are_on_the_cpu(monkeypatch):
    lm = tiny_guarded_lm()
    monkeypatch.setattr(lm.head.response, "forward", lambda features: Pending(torch.ones(2)))
    found = lm.assess("response", FEATURES)
    assert found.seconds >= 0.02
    assert found.logits == [1.0, 1.0]


def test_the_time_of_the_head_does_not_hold_the_pass_before_it(monkeypatch):
    """On a GPU the head begins only when the pass has ended, so the pass must be waited for before its states go on."""
    lm = tiny_guarded_lm()
    order = []
    monkeypatch.setattr(Pending, "to", lambda self, device: order.append(self.value) or torch.zeros(1))
    states = (torch.zeros(1, 32, 32),)
    result = SimpleNamespace(logits={(0, -1): Pending("logits")}, hidden_states=states)
    methods = dict.fromkeys(("forward", "__call__"), lambda self, **_: result)
    monkeypatch.setattr(lm, "model", type("Model", (), {"device": "cpu", **methods})())
    monkeypatch.setattr(lm.head.response, "forward", lambda _: order.append("head") or Pending("risks"))
    output = lm.forward(IDS, None, states_of_last=2)
    lm.assess("response", Passage().extend(output.states))
    assert order == ["logits", "head", "risks"]


def test_a_head_without_its_configuration_is_refused():
    lm = tiny_guarded_lm()
    with pytest.raises(ValueError, match="needs its safety configuration"):
        GuardedLM(lm.model, lm.tokenizer, lm.head)
    with pytest.raises(ValueError, match="needs its safety configuration"):
        GuardedLM(lm.model, lm.tokenizer, config=lm.config)


def test_a_head_of_another_width_is_refused_with_both():
    model, tokenizer = tiny_lm(), byte_tokenizer()
    config = tiny_config(model, tokenizer, token_head=TokenHeadConfig((-1,), 48, 0))
    with pytest.raises(CheckpointError, match="width 48, the model's are 32 wide"):
        GuardedLM(model, tokenizer, TokenHead(config.token_head), config)


def test_every_end_token_of_model_and_tokenizer_counts():
    model = tiny_lm()
    model.generation_config = GenerationConfig(eos_token_id=[5, 6])
    assert GuardedLM(model, byte_tokenizer()).eos_ids == {2, 5, 6}


def test_vocabulary_and_context_are_the_models():
    lm = tiny_guarded_lm()
    assert (lm.vocab_size, lm.context_length) == (259, 512)
