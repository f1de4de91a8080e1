"""A model that is served without a signal, with both sides off."""

import pytest

from model.guarded_lm import GuardedLM
from model.testing import tiny_guarded_lm


def without_signal():
    lm = tiny_guarded_lm()
    return GuardedLM(lm.model, lm.tokenizer)


@pytest.fixture(scope="module")
def plain(serve_all):
    return serve_all(lm=without_signal, input_mode="off", output_mode="off")


def test_it_answers_and_reports_no_risks(plain):
    body = plain.post(max_tokens=3, moderation={"model": "tiny"}).json()
    safety = body["choices"][0]["safety"]
    assert (safety["action"], safety["request_risk"], safety["response_risk"]) == ("none", None, None)
    assert safety["num_assessments"] == 0
    assert body["moderation"]["input"]["results"] == body["moderation"]["output"]["results"] == []


def test_it_cannot_score_so_a_policy_is_a_400(plain):
    response = plain.post(moderation={"model": "tiny", "policy": {"input": {"mode": "score"}}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "moderation"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/moderations", {"input": "hello"}),
        ("/v1/safety/score", {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}),
    ],
)
def test_what_needs_the_signal_is_a_400(plain, path, body):
    response = plain.http.post(path, json=body)
    assert response.status_code == 400
    assert "without a safety signal" in response.json()["error"]["message"]
