from dataclasses import replace

import pytest

from model.chat import EncodedPrompt
from model.errors import ContextLengthError, InvalidRequest
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.request import GenerationRequest, admit
from model.sampling import SamplingParams
from model.testing import byte_tokenizer, tiny_guarded_lm, tiny_lm

REQUEST = GenerationRequest(EncodedPrompt((5, 6, 7)), max_tokens=10)


@pytest.fixture(scope="module")
def lm() -> GuardedLM:
    return tiny_guarded_lm()


def refused(lm: GuardedLM, **changes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        admit(lm, replace(REQUEST, **changes))
    return raised.value


def test_a_request_that_can_be_honoured_is_admitted(lm):
    admit(lm, REQUEST)


def test_a_side_that_is_not_named_blocks():
    assert (REQUEST.input, REQUEST.output) == (Mode.BLOCK, Mode.BLOCK)


def test_prompt_and_tokens_may_fill_the_context_to_the_last(lm):
    admit(lm, replace(REQUEST, max_tokens=509))


def test_one_token_over_the_context_is_refused_with_the_numbers(lm):
    error = refused(lm, max_tokens=510)
    assert isinstance(error, ContextLengthError)
    assert error.param == "max_tokens"
    assert "context is 512 tokens, but the messages have 3 and max_tokens asks for 510 more" in str(error)


def test_a_prefill_counts_towards_the_context(lm):
    error = refused(lm, prompt=EncodedPrompt((5,), (6,) * 510))
    assert "the messages have 511" in str(error)


@pytest.mark.parametrize("length", [512, 513, 100_000])
def test_messages_that_leave_no_room_are_to_blame_themselves(lm, length: int):
    error = refused(lm, prompt=EncodedPrompt((5,) * length))
    assert isinstance(error, ContextLengthError)
    assert error.param == "messages"
    assert str(length) in str(error)


def test_an_empty_request_is_refused(lm):
    assert refused(lm, prompt=EncodedPrompt((), (5,))).param == "messages"


@pytest.mark.parametrize("token", [-1, 259])
def test_an_id_outside_the_vocabulary_is_refused_with_what_is_allowed(lm, token: int):
    for prompt in (EncodedPrompt((5, token)), EncodedPrompt((5,), (token,))):
        error = refused(lm, prompt=prompt)
        assert error.param == "messages"
        assert f"token id {token} is outside the vocabulary, 0 to 258" in str(error)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_no_token_asked_for_is_refused(lm, max_tokens: int):
    error = refused(lm, max_tokens=max_tokens)
    assert error.param == "max_tokens"
    assert f"at least 1, got {max_tokens}" in str(error)


def test_more_tokens_at_least_than_at_most_are_refused(lm):
    error = refused(lm, sampling=SamplingParams(min_tokens=11))
    assert error.param == "min_tokens"
    assert "min_tokens is 11, but max_tokens is 10" in str(error)


@pytest.mark.parametrize("token", [-1, 259])
def test_a_bias_on_a_token_outside_the_vocabulary_is_refused(lm, token: int):
    error = refused(lm, sampling=SamplingParams(logit_bias={token: 1.0}))
    assert error.param == "logit_bias"
    assert f"token {token}; ids are 0 to 258" in str(error)


@pytest.mark.parametrize(("side", "mode"), [("input", Mode.SCORE), ("output", Mode.BLOCK)])
def test_a_model_without_a_signal_admits_only_both_sides_off(side: str, mode: Mode):
    bare = GuardedLM(tiny_lm(), byte_tokenizer())
    both_off = replace(REQUEST, input=Mode.OFF, output=Mode.OFF)
    admit(bare, both_off)
    with pytest.raises(InvalidRequest, match="both sides must be off") as raised:
        admit(bare, replace(both_off, **{side: mode}))
    assert raised.value.param == "moderation"
