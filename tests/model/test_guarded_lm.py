"""The wrapper on seven families of tiny random models, against plain transformers."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from model.config import TokenHeadConfig
from model.errors import CheckpointError
from model.guarded_lm import GuardedLM
from model.safety_head import HeadOutput, TokenHead
from model.testing import FAMILIES, byte_tokenizer, tiny_config, tiny_guarded_lm, tiny_lm

IDS = [1, *range(60, 90), 7]
"""32 tokens: twice the sliding window of the tiny Mistral and Phi-3."""


class FailingHead(nn.Module):
    """A head that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.config = TokenHeadConfig((-1,), 32, 0)

    def forward(self, states: torch.Tensor) -> None:
        raise RuntimeError(" ".join(["my", "darkest", "thought"]))


def plain_logits(lm: GuardedLM, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return lm.model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_the_logits_of_plain_transformers(family: str):
    lm = tiny_guarded_lm(family)
    for assess_last in (0, 1, 32):
        output = lm.forward(IDS, lm.new_cache(), assess_last=assess_last)
        assert torch.equal(output.logits, plain_logits(lm, IDS))


@pytest.mark.parametrize("family", FAMILIES)
def test_token_by_token_gives_the_logits_of_one_pass(family: str):
    lm = tiny_guarded_lm(family)
    cache = lm.new_cache()
    for length, token in enumerate(IDS, start=1):
        logits = lm.forward([token], cache, assess_last=1).logits
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
def test_the_head_reads_the_hidden_states_of_its_layers(layers: tuple[int, ...]):
    model, tokenizer = tiny_lm(), byte_tokenizer()
    config = tiny_config(model, tokenizer, token_head=TokenHeadConfig(layers, 32, 0))
    head = TokenHead(config.token_head)
    lm = GuardedLM(model, tokenizer, head, config)
    output = lm.forward(IDS, lm.new_cache(), assess_last=3)
    with torch.inference_mode():
        states = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
        expected = head(torch.cat([states[layer][0, -3:] for layer in layers], dim=-1))
    torch.testing.assert_close(output.head.response, expected.response)
    torch.testing.assert_close(output.head.request, expected.request)


def test_the_head_is_read_only_where_asked():
    lm = tiny_guarded_lm()
    output = lm.forward(IDS, lm.new_cache())
    assert output.head is None
    assert output.head_s == 0.0


def test_a_model_without_a_head_gives_logits_alone():
    model = tiny_lm()
    lm = GuardedLM(model, byte_tokenizer())
    assert lm.forward(IDS, lm.new_cache(), assess_last=1).head is None


def test_a_head_that_raises_gives_nan_and_a_log_line(caplog):
    lm = tiny_guarded_lm()
    lm.head = FailingHead()
    with caplog.at_level(logging.ERROR):
        output = lm.forward(IDS, lm.new_cache(), assess_last=2)
    assert output.head.request.isnan().tolist() == [True, True]
    assert output.head.response.isnan().tolist() == [True, True]
    assert torch.equal(output.logits, plain_logits(lm, IDS))
    assert "safety head failed" in caplog.text


def test_the_log_line_of_a_failing_head_says_where_and_repeats_no_message(caplog):
    lm = tiny_guarded_lm()
    lm.head = FailingHead()
    with caplog.at_level(logging.ERROR):
        lm.forward(IDS, lm.new_cache(), assess_last=2)
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


def test_the_time_of_the_head_lasts_until_its_logits_are_on_the_cpu(monkeypatch):
    lm = tiny_guarded_lm()
    pending = HeadOutput(Pending(torch.zeros(2)), Pending(torch.ones(2)))
    monkeypatch.setattr(lm.head, "forward", lambda states: pending)
    output = lm.forward(IDS, lm.new_cache(), assess_last=2)
    assert output.head_s >= 0.02
    assert torch.equal(output.head.response, torch.ones(2))


def test_the_time_of_the_head_does_not_hold_the_pass_before_it(monkeypatch):
    """On a GPU the head begins only when the pass has ended, so the pass must be waited for first."""
    lm = tiny_guarded_lm()
    order = []
    monkeypatch.setattr(Pending, "to", lambda self, device: order.append(self.value) or torch.zeros(1))
    states = (torch.zeros(1, 32, 32),)
    result = SimpleNamespace(logits={(0, -1): Pending("logits")}, hidden_states=states)
    monkeypatch.setattr(lm, "model", type("Model", (), {"device": "cpu", "__call__": lambda self, **_: result})())
    monkeypatch.setattr(lm.head, "forward", lambda _: order.append("head") or HeadOutput(Pending("a"), Pending("b")))
    lm.forward(IDS, None, assess_last=2)
    assert order == ["logits", "head", "a", "b"]


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
