"""The stand-ins keep the promises that other tests build on."""

import pytest
import torch

from model.chat import Message
from model.testing import FAMILIES, ScriptedLM, byte_tokenizer, tiny_guarded_lm, tiny_lm


@pytest.mark.parametrize("text", ["plain", "é🙂漢", "a\nb  c", ""])
def test_the_byte_tokenizer_has_one_token_per_byte_and_loses_nothing(text: str):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_what_its_name_says(family: str):
    assert tiny_lm(family).config.model_type == family


def test_tiny_models_are_the_same_every_time_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, second = tiny_guarded_lm(), tiny_guarded_lm()
    assert torch.equal(first.model.lm_head.weight, second.model.lm_head.weight)
    assert torch.equal(first.head.response.out.weight, second.head.response.out.weight)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_is_another_model():
    assert not torch.equal(tiny_lm(seed=1).lm_head.weight, tiny_lm().lm_head.weight)


def test_the_scripted_model_says_its_script_and_then_ends():
    lm = ScriptedLM("ab")
    cache, said = lm.new_cache(), []
    ids = list(lm.chat.encode([Message("user", "hi")]).request)
    for _ in range(3):
        ids = [int(lm.forward(ids, cache).logits.argmax())]
        said += ids
    assert lm.tokenizer.decode(said) == "ab<|im_end|>"


def test_the_scripted_model_notes_what_was_fed():
    lm = ScriptedLM("ab")
    lm.forward([5, 6], cache := lm.new_cache())
    lm.forward([7], cache)
    assert lm.fed == [(5, 6), (7,)]


def test_the_scripted_model_fails_at_the_pass_it_is_told():
    lm = ScriptedLM("ab", fails_at=2)
    lm.forward([5], cache := lm.new_cache())
    with pytest.raises(RuntimeError, match="scripted fault"):
        lm.forward([6], cache)
