"""The plain loop on seven families of tiny random models, against a recomputation without a cache."""

from dataclasses import replace

import pytest
import torch

from model.config import TokenHeadConfig
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.sampling import SamplingParams
from model.schedule import First
from model.scoring import score
from model.testing import FAMILIES, tiny_guarded_lm

NUM_TOKENS = 30
"""With the request, three times the sliding window of the tiny Mistral and Phi-3."""
HARM = "Z"


def greedy_ids(lm: GuardedLM, ids: list[int], count: int, stop: str | None = None) -> list[int]:
    """Return up to `count` greedy tokens after `ids`, feeding everything at every step."""
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < count:
            token = int(lm.model(torch.tensor([[*ids, *new]]), use_cache=False).logits[0, -1].argmax())
            if token in lm.eos_ids:
                break
            new.append(token)
            if lm.tokenizer.decode(token) == stop:
                break
    return new


def harm_detecting_lm(family: str) -> GuardedLM:
    """Return a tiny model whose head reads the embedding and calls one letter harm, whatever is around it.

    It gives no weight to the mean of the passage.

    The embeddings are random and 32 wide, so the projection of another letter's on this one's is far
    below 1: its logit is 20 * projection - 15, which is 5 for the letter itself.
    """
    lm = tiny_guarded_lm(family, token_head=TokenHeadConfig((0,), 32, 0))
    (letter,) = lm.tokenizer.encode(HARM)
    with torch.no_grad():
        states = lm.model(torch.tensor([[letter]]), output_hidden_states=True).hidden_states[0][0, 0]
        lm.head.request.out.weight.zero_()
        lm.head.response.out.weight[0] = torch.cat([20 * states / states.dot(states), torch.zeros(32)])
        for part in (lm.head.request, lm.head.response):
            part.out.bias.fill_(-15.0)
    return lm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [Mode.OFF, Mode.SCORE])
def test_greedy_tokens_are_those_of_a_recomputation_without_a_cache(family: str, mode: Mode, make_request, ask):
    lm = tiny_guarded_lm(family)
    prompt = make_request(lm).prompt
    answer = ask(lm, max_tokens=NUM_TOKENS, input=mode, output=mode)
    ids = [token.token_id for token in answer.tokens]
    assert ids == greedy_ids(lm, list(prompt.request), NUM_TOKENS)
    assert answer.text == lm.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_is_continued_as_without_a_cache(family: str, make_request, ask):
    lm = tiny_guarded_lm(family)
    prompt = make_request(lm, prefill="well, ").prompt
    answer = ask(lm, prefill="well, ", max_tokens=NUM_TOKENS, input=Mode.SCORE, output=Mode.SCORE)
    expected = greedy_ids(lm, [*prompt.request, *prompt.prefill], NUM_TOKENS)
    assert [token.token_id for token in answer.tokens] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill", [None, "a clear opening, longer than any window of these models"])
def test_after_a_rollback_the_refusal_is_as_if_the_rest_had_never_been(family: str, prefill, make_request, ask):
    # A bias makes the model say the harmful letter until the alarm; the refusal knows no bias.
    lm = harm_detecting_lm(family)
    (letter,) = lm.tokenizer.encode(HARM)
    answer = ask(lm, prefill=prefill, sampling=SamplingParams(temperature=0, logit_bias={letter: 100}))
    prefix = lm.tokenizer.encode("sorry, no")
    ids = [*make_request(lm).prompt.request, *prefix]
    assert answer.finish.action == "rolled_back"
    assert answer.finish.num_withdrawn_tokens == 3
    expected = greedy_ids(lm, ids, lm.config.refusal.max_tokens, stop="\n")
    released = [token.token_id for token in answer.refusal_tokens]
    assert released == [*prefix, *(token for token in expected if lm.tokenizer.decode(token) != "\n")]


@pytest.mark.parametrize("family", FAMILIES)
def test_risks_along_a_generation_are_those_of_scoring_the_same_text(family: str, make_request, ask):
    lm = tiny_guarded_lm(family, smoothing=0.3)
    prompt = make_request(lm).prompt
    answer = ask(lm, max_tokens=NUM_TOKENS, input=Mode.SCORE, output=Mode.SCORE)
    trace = score(lm, replace(prompt, prefill=tuple(token.token_id for token in answer.tokens)))
    assert [t.risk for t in answer.tokens] == pytest.approx([a.risk for a in trace.assessments], abs=1e-4)
    assert answer.finish.request_risk == pytest.approx(trace.request_risk, abs=1e-4)
    assert answer.finish.response_risk == pytest.approx(trace.response_risk(lm.config.patience), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_assessment_of_a_sparse_schedule_is_that_of_scoring_the_same_text(family: str, make_request, ask):
    # The tokens before it were fed without an assessment; they must stand in its mean all the same.
    lm = tiny_guarded_lm(family)
    unended = SamplingParams(temperature=0, logit_bias=dict.fromkeys(lm.eos_ids, -100), min_tokens=5)
    for sampling in (unended, SamplingParams(seed=4, logit_bias=dict.fromkeys(lm.eos_ids, 4))):  # by length, by itself
        answer = ask(lm, max_tokens=20, sampling=sampling, input=Mode.OFF, output=Mode.SCORE, schedule=First())
        ids = tuple(token.token_id for token in answer.tokens)
        trace = score(lm, replace(make_request(lm).prompt, prefill=ids))
        assert answer.finish.reason == ("length" if sampling is unended else "stop")
        assert answer.finish.response_risk == pytest.approx(trace.assessments[-1].risk, abs=1e-4)


def test_a_prefill_has_the_risks_of_scoring_it(make_request, ask):
    lm = tiny_guarded_lm()
    prompt = make_request(lm, prefill="some words").prompt
    answer = ask(lm, prefill="some words", max_tokens=1, input=Mode.SCORE, output=Mode.SCORE)
    whole = replace(prompt, prefill=(*prompt.prefill, *(token.token_id for token in answer.tokens)))
    trace = score(lm, whole)
    assert answer.finish.response_risk == pytest.approx(trace.response_risk(lm.config.patience), abs=1e-4)
    assert answer.finish.num_assessments == 1 + 10 + len(answer.tokens)
