import json

import openai
import pytest
from openai.types import ModerationCreateResponse
from openai.types.chat import ChatCompletion

from model.config import Thresholds

SCORE_BOTH = {"input": {"mode": "score"}, "output": {"mode": "score"}}


def in_band(server, text="hello", policy=None, **fields):
    field = {"model": "omni-moderation-latest"} | ({"policy": policy} if policy else {})
    return server.post(messages=[{"role": "user", "content": text}], moderation=field, **fields)


def test_the_moderation_object_has_the_shape_of_the_openai_client(polite):
    completion = ChatCompletion.model_validate(in_band(polite).json())
    (result,) = completion.moderation.input.results
    assert completion.moderation.input.type == "moderation_results"
    assert result.categories == {"unsafe": False}
    assert 0 < result.category_scores["unsafe"] < 0.01
    assert result.category_applied_input_types == {"unsafe": ["text"]}
    assert result.model == "tiny"


def test_there_is_no_moderation_object_unless_asked_for(polite):
    assert "moderation" not in polite.post().json()


def test_a_null_moderation_field_asks_for_nothing(polite):
    assert "moderation" not in polite.post(moderation=None).json()


def test_the_output_has_one_result_for_each_choice(polite):
    moderation = in_band(polite, n=3).json()["moderation"]
    assert len(moderation["input"]["results"]) == 1
    assert len(moderation["output"]["results"]) == 3


def test_a_side_that_is_off_has_no_results(serve):
    moderation = in_band(serve(output_mode="off")).json()["moderation"]
    assert len(moderation["input"]["results"]) == 1
    assert moderation["output"] == {"type": "moderation_results", "model": "tiny", "results": []}


def test_scoring_a_side_lets_a_malicious_request_through_and_flags_it(polite):
    body = in_band(polite, "HARM", SCORE_BOTH).json()
    assert body["choices"][0]["message"]["content"] == "good day."
    assert body["moderation"]["input"]["results"][0]["flagged"] is True
    assert body["moderation"]["output"]["results"][0]["flagged"] is False


def test_a_side_that_the_request_leaves_out_keeps_the_servers_mode(polite):
    body = in_band(polite, "HARM", {"output": {"mode": "score"}}).json()
    assert body["choices"][0]["finish_reason"] == "content_filter"


def test_a_request_may_tighten_a_servers_mode(serve):
    server = serve(input_mode="off", expose_risk="flag")
    assert server.chat("HARM").choices[0].finish_reason == "stop"
    assert (
        in_band(server, "HARM", {"input": {"mode": "block"}}).json()["choices"][0]["finish_reason"] == "content_filter"
    )


def test_a_refusal_flags_the_input_and_a_rollback_the_output(serve):
    server = serve("all is well here, friends. NOW SOME HARM")
    refused, rolled_back = in_band(server, "HARM").json(), in_band(server).json()
    assert refused["moderation"]["input"]["results"][0]["flagged"] is True
    assert rolled_back["moderation"]["input"]["results"][0]["flagged"] is False
    assert rolled_back["moderation"]["output"]["results"][0]["flagged"] is True


def test_a_side_on_which_the_policy_acted_is_flagged_below_the_flag_threshold_too(serve, scripted):
    server = serve(lm=lambda: scripted("good day.", request=Thresholds(block=0.5, flag=0.99999)))
    (result,) = in_band(server, "HARM").json()["moderation"]["input"]["results"]
    assert result["category_scores"]["unsafe"] < 0.99999
    assert result["flagged"] is True


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("side", "other"), [("input", "output"), ("output", "input")])
def test_a_side_on_which_the_head_failed_is_an_error_and_no_score(serve_broken, side, other, stream):
    server = serve_broken({"input": "request", "output": "response"}[side])
    answer = server.chat("hello", n=2, stream=stream, moderation={"model": "tiny", "policy": SCORE_BOTH})
    (found,) = [chunk.moderation for chunk in answer if chunk.moderation] if stream else [answer.moderation]
    assert getattr(found, side).type == "error"
    assert getattr(found, side).code == "head_failed"
    assert "head failed" in getattr(found, side).message
    assert getattr(found, other).type == "moderation_results"
    if not stream:
        ChatCompletion.model_validate(answer.model_dump())


def test_the_policy_still_takes_a_failed_head_for_unsafe(serve_broken):
    body = in_band(serve_broken("request")).json()
    assert body["choices"][0]["finish_reason"] == "content_filter"
    assert body["moderation"]["input"]["type"] == "error"


def test_a_failure_is_not_told_where_no_judgement_would_be(serve_broken):
    off = in_band(serve_broken("response", "x", input_mode="block", output_mode="off"), "HARM").json()
    assert off["moderation"]["output"] == {"type": "moderation_results", "model": "tiny", "results": []}
    hidden = in_band(serve_broken("request", expose_risk="none")).json()
    assert hidden["moderation"]["input"]["type"] == "moderation_results"


@pytest.mark.parametrize(("texts", "param"), [("hello", "input"), (["a", "b"], "input[0]")])
def test_a_text_on_which_the_head_failed_is_a_500_and_no_score(serve_broken, texts, param):
    response = serve_broken("request").http.post("/v1/moderations", json={"input": texts})
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "head_failed", param)
    assert "head failed" in error["message"]


def test_another_moderation_model_is_a_404_that_names_the_field(polite):
    response = polite.post(moderation={"model": "gpt-guard"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert response.json()["error"]["param"] == "moderation.model"


def test_aliases_of_the_moderation_model_can_be_set(serve):
    server = serve(moderation_aliases=("guard",))
    assert server.post(moderation={"model": "guard"}).status_code == 200
    assert in_band(server).status_code == 404


@pytest.mark.parametrize(
    ("policy", "param"),
    [
        ({"output": {"mode": "off"}}, "moderation.policy.output.mode"),
        ({"input": {}}, "moderation.policy.input.mode"),
        ({"both": {"mode": "score"}}, "moderation.policy.both"),
    ],
)
def test_a_wrong_policy_is_a_400_that_names_the_field(polite, policy, param):
    response = in_band(polite, policy=policy)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_texts_are_moderated_with_every_category_of_the_api_and_our_own(polite):
    response = polite.client().moderations.create(model="omni-moderation-latest", input=["hello", "HARM"])
    ModerationCreateResponse.model_validate(response.model_dump(by_alias=True))
    safe, unsafe = response.results
    assert (safe.flagged, unsafe.flagged) == (False, True)
    assert unsafe.categories.unsafe is True
    assert unsafe.category_scores.unsafe > 0.9
    assert safe.category_scores.unsafe < 0.01
    judged = [name for name, value in unsafe.categories.model_dump(by_alias=True).items() if value]
    assert judged == ["unsafe"]
    assert len(unsafe.categories.model_dump(by_alias=True)) == 14


def test_one_string_and_one_list_of_parts_are_one_text_each(polite):
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "HARM"}]
    assert len(polite.client().moderations.create(input="HARM").results) == 1
    (result,) = polite.client().moderations.create(model="tiny", input=parts).results
    assert result.flagged is True


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ([], "input"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "input[0].type"),
        (7, "input"),
        (["a", 7], "input[1]"),
        ("\ud800", "input"),
        ("a" * 600, "input"),
        ("<|im_end|>", "input"),
        (["a", "<|im_end|>"], "input[1]"),
        (["a", "a" * 600], "input[1]"),
    ],
)
def test_input_that_cannot_be_moderated_is_a_400_that_names_it(polite, text, param):
    response = polite.http.post(
        "/v1/moderations", content=json.dumps({"input": text}), headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_moderation_by_another_model_is_a_404(polite):
    with pytest.raises(openai.NotFoundError):
        polite.client().moderations.create(model="gpt-guard", input="x")
