"""The query is read token by token: what is read, what is kept of it, and that it may only raise the request risk."""

import math

import pytest
import torch

from model.chat import Message
from model.config import TokenHeadConfig
from model.generation import PREFILL_CHUNK
from model.guarded_lm import GuardedLM
from model.safety_head import TokenHead
from model.scoring import score
from model.testing import byte_tokenizer, tiny_config, tiny_guarded_lm, tiny_lm
from model.trace import LOGIT_LIMIT, Highest, Trace, probability

HEAD = TokenHeadConfig((1, -1), 32, 0, reads_query=True)


def guarded(smoothing: float, of_request: float) -> GuardedLM:
    """A model whose head finds `of_request` at the end of each request."""
    model, tokenizer = tiny_lm(context_length=2048), byte_tokenizer()
    config = tiny_config(model, tokenizer, token_head=HEAD, smoothing=smoothing)
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        head = TokenHead(HEAD)
    head.request.out.weight.data.zero_()
    head.request.out.bias.data.fill_(of_request)
    return GuardedLM(model, tokenizer, head, config)


def request_risk(lm: GuardedLM, text: str) -> float:
    risk = score(lm, lm.chat.encode([Message("user", text)])).request_risk
    assert risk is not None
    return risk


@pytest.mark.parametrize("smoothing", [0.15, 1.0])
@pytest.mark.parametrize("length", [1, 20, PREFILL_CHUNK + 100])
@torch.inference_mode()
def test_the_request_risk_is_the_highest_smoothed_logit_of_the_query(smoothing: float, length: int) -> None:
    lm = guarded(smoothing, of_request=-9.0)
    text = ("a stitch in time " * 40)[:length]
    prompt = lm.chat.encode([Message("system", "Be kind."), Message("user", text)])
    states = lm.model(input_ids=torch.tensor([prompt.request]), output_hidden_states=True).hidden_states
    read = torch.cat([states[layer][0, prompt.query_start :] for layer in HEAD.layers], dim=-1)
    trace = Trace(smoothing)
    for position, logit in enumerate(lm.head.query(read).tolist(), start=1):
        trace.add(position, logit)
    expected = max(assessment.smoothed for assessment in trace.assessments)
    assert expected > probability(-9.0)
    assert score(lm, prompt).request_risk == pytest.approx(expected, abs=1e-5)


def test_what_the_end_says_is_never_lowered() -> None:
    lm = guarded(0.15, of_request=9.0)
    assert request_risk(lm, "a stitch in time") == pytest.approx(probability(9.0))


@pytest.mark.parametrize("failed", [math.nan, math.inf, -math.inf])
def test_a_head_of_the_query_that_fails_counts_as_certain_harm(failed: float) -> None:
    lm = guarded(0.15, of_request=-9.0)
    lm.head.query.out.bias.data.fill_(failed)
    trace = score(lm, lm.chat.encode([Message("user", "a stitch in time")]))
    assert trace.request_risk == 1.0
    assert trace.is_request_failed


def test_without_such_a_head_the_end_decides() -> None:
    lm = tiny_guarded_lm(token_head=TokenHeadConfig((1, -1), 32, 0))
    assert not lm.reads_query
    lm.head.request.out.weight.data.zero_()
    lm.head.request.out.bias.data.fill_(-9.0)
    assert request_risk(lm, "a stitch in time" * 9) == pytest.approx(probability(-9.0))


def test_the_highest_is_that_of_the_moving_average() -> None:
    highest = Highest(0.5)
    assert highest.logit is None
    highest.add([0.0, 4.0])
    highest.add([2.0, -4.0])
    assert highest.logit == 2.0  # of 0, 2, 2 and -1
    highest.raise_to(1.0)
    assert highest.logit == 2.0
    highest.raise_to(3.0)
    highest.add([3.0])
    assert highest.logit == 3.0


def test_one_extreme_logit_is_limited() -> None:
    highest = Highest(0.5)
    highest.add([0.0, 1e9])
    assert highest.logit == LOGIT_LIMIT / 2


@pytest.mark.parametrize("failed", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_of_a_token", [True, False])
def test_what_failed_stays_failed(failed: float, is_of_a_token: bool) -> None:
    highest = Highest(0.5)
    highest.add([0.0, failed, 1.0] if is_of_a_token else [0.0])
    if not is_of_a_token:
        highest.raise_to(failed)
    highest.raise_to(7.0)
    assert highest.logit is not None
    assert math.isnan(highest.logit)
