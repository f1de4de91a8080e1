import pytest
import torch

from model.chat import EncodedPrompt, Message
from model.errors import ContextLengthError, InvalidRequest
from model.guarded_lm import GuardedLM
from model.scoring import score, score_in_passes
from model.testing import ScriptedLM, byte_tokenizer, tiny_guarded_lm, tiny_lm
from model.trace import probability


def conversation(lm: GuardedLM, user: str, answer: str) -> EncodedPrompt:
    return lm.chat.encode([Message("user", user), Message("assistant", answer)], continue_final=True)


def test_each_response_token_has_an_assessment():
    # In the scripted model an upper-case letter is harm.
    lm = ScriptedLM("")
    trace = score(lm, conversation(lm, "hi", "abCd"))
    assert [a.position for a in trace.assessments] == [1, 2, 3, 4]
    assert [a.risk > 0.5 for a in trace.assessments] == [False, False, True, False]


@pytest.mark.parametrize(("user", "is_malicious"), [("hi", False), ("Hi", True)])
def test_the_request_risk_is_read_at_the_end_of_the_request(user: str, is_malicious: bool):
    lm = ScriptedLM("")
    assert (score(lm, conversation(lm, user, "abc")).request_risk > 0.5) is is_malicious


def test_a_request_alone_has_no_response_risk():
    lm = ScriptedLM("")
    trace = score(lm, lm.chat.encode([Message("user", "hi")]))
    assert trace.response_risk(3) is None
    assert trace.request_risk is not None


def test_risks_are_the_heads_at_the_states_of_one_pass():
    lm = tiny_guarded_lm()
    prompt = conversation(lm, "hi", "some text")
    trace = score(lm, prompt)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt.request, *prompt.prefill]])
        states = lm.model(ids, output_hidden_states=True).hidden_states[-1][0]
        query, response = states[prompt.query_start : len(prompt.request)], states[len(prompt.request) :]
        (of_request,) = lm.head.request(torch.cat([query[-1], query.mean(dim=0)])[None])
        means = [response[: length + 1].mean(dim=0) for length in range(len(response))]
        of_response = lm.head.response(torch.cat([response, torch.stack(means)], dim=-1))
    assert trace.request_risk == pytest.approx(probability(float(of_request)), abs=1e-6)
    expected = [probability(float(logit)) for logit in of_response]
    assert [a.risk for a in trace.assessments] == pytest.approx(expected, abs=1e-6)


def test_a_conversation_of_one_piece_is_one_forward_pass():
    lm = ScriptedLM("")
    score(lm, conversation(lm, "hi", "a" * 200))
    assert len(lm.fed) == 1


def long_lm() -> GuardedLM:
    model, tokenizer = tiny_lm(context_length=2048), byte_tokenizer()
    lm = tiny_guarded_lm(smoothing=0.3)
    return GuardedLM(model, tokenizer, lm.head, lm.config)


# The chat template adds 19 tokens: the border lies in a piece, at its end, one before and one after it.
@pytest.mark.parametrize("num_user", [1000, 1005, 1004, 1006, 3, 1700])
def test_a_long_conversation_read_in_pieces_has_the_trace_of_one_pass(num_user: int, monkeypatch):
    lm = long_lm()
    prompt = conversation(lm, "u" * num_user, "some text " * 25)
    assert len(prompt.request) == num_user + 19
    in_pieces = score(lm, prompt)
    monkeypatch.setattr("model.generation.PREFILL_CHUNK", 2048)
    at_once = score(lm, prompt)
    assert in_pieces.request_risk == pytest.approx(at_once.request_risk, abs=1e-5)
    assert [a.position for a in in_pieces.assessments] == list(range(1, 251))
    for name in ("risk", "smoothed"):
        found, expected = ([getattr(a, name) for a in trace.assessments] for trace in (in_pieces, at_once))
        assert found == pytest.approx(expected, abs=1e-5)


def test_each_pass_reads_a_piece_and_the_head_only_what_is_assessed():
    lm = ScriptedLM("")
    lm.context_length = 4096
    *passes, trace = score_in_passes(lm, conversation(lm, "u" * 1100, "a" * 500))
    assert [len(ids) for ids in lm.fed] == [512, 512, 512, 1619 - 1536]
    # The request ends at token 1119, the 95th of the third piece.
    assert [work.num_assessments for work in passes] == [0, 0, 512 - 94, 83]
    assert (trace.position, trace.num_failures) == (500, 0)


def test_a_pass_is_made_only_when_it_is_asked_for():
    lm = ScriptedLM("")
    lm.context_length = 4096
    passes = score_in_passes(lm, conversation(lm, "u" * 1100, "a"))
    assert lm.fed == []
    next(passes)
    assert len(lm.fed) == 1


def test_smoothing_is_that_of_the_checkpoint():
    lm = ScriptedLM("", smoothing=0.25)
    trace = score(lm, conversation(lm, "hi", "aB"))
    # Logits -8 and 8: 0.25 * 8 + 0.75 * -8 = -4.
    assert [a.smoothed_logit for a in trace.assessments] == pytest.approx([-8, -4])


def test_a_failed_head_is_certain_harm():
    lm = tiny_guarded_lm()
    with torch.no_grad():
        lm.head.request.out.bias.fill_(float("nan"))
        lm.head.response.out.bias.fill_(float("nan"))
    trace = score(lm, conversation(lm, "hi", "abc"))
    assert trace.request_risk == 1.0
    assert [a.risk for a in trace.assessments] == [1.0] * 3
    assert trace.num_failures == 4


@pytest.mark.parametrize(("side", "num_failures"), [("request", 1), ("response", 3)])
def test_failures_are_those_of_the_side_that_was_read(side: str, num_failures: int):
    lm = tiny_guarded_lm()
    with torch.no_grad():
        getattr(lm.head, side).out.bias.fill_(float("inf"))
    work, trace = score_in_passes(lm, conversation(lm, "hi", "abc"))
    assert (work.num_assessments, work.num_failures) == (4, num_failures)
    assert trace.num_failures == num_failures
    assert trace.is_request_failed is (side == "request")


def test_a_model_without_a_signal_cannot_score():
    lm = GuardedLM(tiny_lm(), byte_tokenizer())
    with pytest.raises(InvalidRequest, match="no safety signal") as raised:
        score(lm, conversation(lm, "hi", "abc"))
    assert raised.value.param == "model"


def test_a_conversation_over_the_context_is_refused_with_both_numbers():
    lm = tiny_guarded_lm()
    prompt = conversation(lm, "hi", "a" * 600)
    length = len(prompt.request) + 600
    with pytest.raises(ContextLengthError, match=f"512 tokens, but the messages have {length}"):
        score(lm, prompt)


def test_a_conversation_that_fills_the_context_is_scored():
    lm = tiny_guarded_lm()
    request = lm.chat.encode([Message("user", "hi")]).request
    trace = score(lm, EncodedPrompt(request, (70,) * (512 - len(request))))
    assert trace.position == 512 - len(request)
