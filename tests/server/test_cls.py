"""Serving a checkpoint with a `[CLS]` signal, alone or beside a token head, over HTTP.

In the scripted model an upper-case letter is harm, and `[CLS]` is suspicious where it reads one.
"""

import json
from typing import Any

import pytest

from model.config import ClsConfig
from model.testing import ScriptedLM

CLS = ClsConfig(windows=(4, 5, 3), schedule="periodic-4")


def chat(server, text: str, **fields: Any):
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 40, "temperature": 0}
    return server.http.post("/v1/chat/completions", json={**body, **fields}).json()["choices"][0]


@pytest.fixture(params=["alone", "beside a token head"])
def kind(request) -> dict[str, Any]:
    return {"cls": CLS, "token_head": None} if request.param == "alone" else {"cls": CLS}


def test_a_harmless_answer_comes_whole(serve, kind):
    server = serve(lm=lambda: ScriptedLM("all is well today", **kind))
    found = chat(server, "hi")
    assert (found["message"]["content"], found["finish_reason"]) == ("all is well today", "stop")
    assert found["safety"]["action"] == "none"


def test_a_malicious_request_is_refused(serve, kind):
    server = serve(lm=lambda: ScriptedLM("all is well today", **kind))
    found = chat(server, "Bad")
    assert (found["finish_reason"], found["safety"]["action"]) == ("content_filter", "refused")


def test_harm_in_mid_response_is_rolled_back(serve, kind):
    server = serve(lm=lambda: ScriptedLM("all is well and then HARMFULLY it comes", **kind))
    found = chat(server, "hi")
    assert (found["finish_reason"], found["safety"]["action"]) == ("content_filter", "rolled_back")
    said, refusal = found["message"]["content"].split("\n\n")
    assert (said.strip(), refusal) == ("all is well and then", "sorry, no. bye.")


def test_a_trace_says_where_cls_alone_was_assessed(serve):
    server = serve(lm=lambda: ScriptedLM("abcdefghij", cls=CLS, token_head=None))
    trace = chat(server, "hi", safety={"trace": True})["safety"]["trace"]
    assert [place for place, token in enumerate(trace, start=1) if token["risk"] is not None] == [4, 8, 10]


def test_a_score_has_a_risk_at_every_token(serve):
    server = serve(lm=lambda: ScriptedLM("", cls=CLS, token_head=None))
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "abcdefghiJ"}]
    found = server.http.post("/v1/safety/score", json={"model": "tiny", "messages": messages, "trace": True}).json()
    assert [token["risk"] > 0.5 for token in found["trace"]] == [False] * 9 + [True]
    assert found["flagged"] == {"request": False, "response": True}
    assert found["response_risk"] == found["trace"][-1]["risk"]


def test_a_stream_never_carries_what_is_withdrawn(serve, kind):
    server = serve(lm=lambda: ScriptedLM("all is well and then HARMFULLY it comes", **kind))
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "stream": True}
    lines = server.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert text.startswith("all is well and then")
    assert "H" not in text
