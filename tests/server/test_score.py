import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.answer import token_texts


def score(server, *turns, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return server.http.post("/v1/safety/score", json={"model": "tiny", "messages": messages, **fields})


def test_a_request_alone_has_no_response_risk(polite):
    body = score(polite, "HARM").json()
    assert body["request_risk"] > 0.9
    assert body["response_risk"] is None
    assert body["flagged"] == {"request": True, "response": None}
    assert body["thresholds"] == {
        "patience": 3,
        "request": {"block": 0.9, "flag": 0.5},
        "response": {"block": 0.9, "flag": 0.5},
    }
    assert "trace" not in body


@pytest.mark.parametrize(("response", "flagged"), [("all well", False), ("all WELL", True), ("A b C d", False)])
def test_a_last_message_of_the_assistant_is_scored_as_the_policy_would_act(polite, response, flagged):
    """Patience 3: three harmful tokens in a row count, or a harmful last one; single ones do not."""
    body = score(polite, "hello", response).json()
    assert body["flagged"] == {"request": False, "response": flagged}
    assert (body["response_risk"] > 0.5) is flagged


def test_an_empty_response_is_not_judged(polite):
    body = score(polite, "hello", "").json()
    assert (body["response_risk"], body["flagged"]) == (None, {"request": False, "response": None})


def test_a_trace_has_every_token_of_the_response(polite):
    trace = score(polite, "hello", "aBc", trace=True).json()["trace"]
    assert [step["token"] for step in trace] == ["a", "B", "c"]
    assert [step["risk"] > 0.5 for step in trace] == [False, True, False]
    assert all(set(step) == {"token_id", "token", "risk", "smoothed_risk"} for step in trace)


def test_scoring_a_short_conversation_takes_one_forward_pass_and_generates_nothing(serve):
    server = serve()
    before = len(server.engine.lm.fed)
    assert score(server, "hello", "all well").status_code == 200
    assert len(server.engine.lm.fed) == before + 1


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages"),
        ({"temperature": 1}, 400, "temperature"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(polite, fields, status, param):
    response = score(polite, "hello", **fields)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("side", ["request", "response"])
def test_a_conversation_on_which_the_head_failed_is_a_500_and_no_score(serve_broken, side):
    response = score(serve_broken(side), "hello", "abc")
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "head_failed", "messages")
    assert str({"request": 1, "response": 3}[side]) in error["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"max_tokens": 1}),
        ("/v1/safety/score", {}),
        ("/v1/moderations", {"messages": None, "input": "hello"}),
    ],
)
def test_a_cache_salt_reaches_the_cache(serve, path, fields):
    server = serve()
    salts = []
    runner = server.engine._worker.runner
    opened = runner.open
    runner.open = lambda prompt, **how: salts.append(how["salt"]) or opened(prompt, **how)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}
    body = {name: value for name, value in body.items() if value is not None}
    for salt in ({}, {"cache_salt": "tenant 7"}):
        assert server.http.post(path, json=body | salt).status_code == 200
    assert salts == ["", "tenant 7"]
    for salt in ("", "x" * 257):
        assert server.http.post(path, json=body | {"cache_salt": salt}).status_code == 400
    content = json.dumps(body | {"cache_salt": "\ud800"})
    response = server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert (response.status_code, "surrogate" in response.text) == (400, True)


def test_the_text_of_a_token_keeps_its_space_where_decoding_leaves_out_the_first():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁dog": 1, "s": 2}, unk_token="s"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer.decode([1]) == "dog"
    assert [token_texts(tokenizer)(token_id) for token_id in (1, 2)] == [" dog", "s"]
