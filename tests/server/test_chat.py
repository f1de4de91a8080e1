import openai
import pytest
from openai.types.chat import ChatCompletion

from model.testing import byte_tokenizer, tiny_guarded_lm


def test_an_answer_has_the_shape_of_the_openai_client(polite):
    completion = polite.chat("hello")
    ChatCompletion.model_validate(completion.model_dump())
    assert completion.choices[0].message.content == "good day."
    assert completion.choices[0].message.refusal is None
    assert completion.choices[0].finish_reason == "stop"
    assert completion.id.startswith("chatcmpl-")
    assert completion.model == "tiny"


def test_usage_counts_the_prompt_once_and_the_tokens_of_every_choice(polite):
    one = polite.chat("hello").usage
    three = polite.chat("hello", n=3).usage
    assert three.prompt_tokens == one.prompt_tokens
    assert (one.completion_tokens, three.completion_tokens) == (9, 27)
    assert three.total_tokens == three.prompt_tokens + 27


def test_n_choices_come_back_in_order(polite):
    choices = polite.chat("hello", n=3).choices
    assert [choice.index for choice in choices] == [0, 1, 2]
    assert {choice.message.content for choice in choices} == {"good day."}


def test_an_answer_without_a_limit_is_as_long_as_the_cache_has_room_for(serve, monkeypatch):
    server = serve("a" * 400)
    monkeypatch.setattr("server.engine.local.LocalEngine.longest", 100)
    usage = server.chat("hello").usage
    assert usage.total_tokens == 100
    with pytest.raises(openai.BadRequestError, match="the server has room for 100 tokens of a conversation"):
        server.chat("hello", max_tokens=100)
    with pytest.raises(openai.BadRequestError, match="room for 100 tokens of a conversation, but the m") as raised:
        server.chat("h" * 120, extra_body={"min_tokens": 5})
    assert raised.value.param == "messages"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_reaches_its_length_says_so(polite, field):
    choice = polite.chat("hello", **{field: 4}).choices[0]
    assert choice.message.content == "good"
    assert choice.finish_reason == "length"


def test_an_answer_without_text_has_null_content_and_never_an_empty_string(serve):
    server = serve("")
    choice = server.post().json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None}
    assert all("content" not in chunk["choices"][0]["delta"] for chunk in server.stream())


def test_text_from_a_stop_string_on_is_not_sent(polite):
    choice = polite.chat("hello", stop=["day"]).choices[0]
    assert choice.message.content == "good "
    assert choice.finish_reason == "stop"
    assert polite.chat("hello", stop=" day").choices[0].message.content == "good"


def test_parts_of_a_message_are_joined_and_developer_means_system(polite):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = polite.post(messages=[{"role": "developer", "content": "a\nb"}]).json()["usage"]["prompt_tokens"]
    assert polite.post(messages=[{"role": "system", "content": parts}]).json()["usage"]["prompt_tokens"] == joined


def test_an_earlier_refusal_with_null_content_is_read_as_its_text(polite):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "never"}]
    spelled = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "never"}]
    last = {"role": "user", "content": "b"}
    usages = [polite.post(messages=[*history, last]).json()["usage"] for history in (turns, spelled)]
    assert usages[0] == usages[1]


def test_an_answer_can_be_sent_back_as_history_just_as_it_came(polite):
    first = polite.chat("hello").choices[0].message
    turns = [{"role": "user", "content": "hello"}, first.model_dump(), {"role": "user", "content": "and?"}]
    assert polite.chat(messages=turns).choices[0].finish_reason == "stop"


def test_log_probabilities_cover_every_token_with_the_alternatives_asked_for(polite):
    content = polite.chat("hello", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in content) == "good day."
    assert bytes(byte for token in content for byte in token.bytes) == b"good day."
    assert all(len(token.top_logprobs) == 2 and token.logprob == pytest.approx(0.0, abs=1e-6) for token in content)


def test_log_probabilities_are_null_unless_asked_for(polite):
    assert polite.chat("hello").choices[0].logprobs is None


def test_a_bias_can_forbid_a_token(polite):
    answer = polite.chat("hello", max_tokens=1, logprobs=True).choices[0]
    assert answer.message.content == "g"
    letter = str(byte_tokenizer().encode("g")[0])
    biased = polite.chat("hello", max_tokens=1, temperature=0, logit_bias={letter: -100}).choices[0].message.content
    assert biased != "g"


def test_min_tokens_and_ignore_eos_keep_an_answer_going(polite):
    assert polite.chat("hello", max_tokens=30).usage.completion_tokens == 9
    assert polite.chat("hello", max_tokens=30, extra_body={"ignore_eos": True}).usage.completion_tokens == 30
    assert polite.chat("hello", max_tokens=30, extra_body={"min_tokens": 12}).usage.completion_tokens >= 12


def test_a_seed_gives_the_same_text_again(serve):
    server = serve(lm=tiny_guarded_lm, input_mode="off", output_mode="off")
    texts = [server.chat("hello", seed=seed, max_tokens=12).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prefilled_answer_is_continued(polite):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    assert polite.chat(messages=turns, extra_body=extra).choices[0].message.content == " day."


def test_the_default_length_is_what_the_context_has_left(serve):
    server = serve("a" * 600)
    usage = server.post().json()["usage"]
    assert usage["total_tokens"] == 512


def test_the_safety_object_reports_what_the_policy_saw(polite):
    safety = polite.post().json()["choices"][0]["safety"]
    assert safety["action"] == "none"
    assert 0 < safety["request_risk"] < 0.01
    assert 0 < safety["response_risk"] < 0.01
    assert safety["num_assessments"] == 10  # the request and nine tokens
    assert safety["num_withdrawn_tokens"] == 0
    assert "trace" not in safety


def test_a_trace_has_the_risk_of_every_released_token(polite):
    trace = polite.post(safety={"trace": True}).json()["choices"][0]["safety"]["trace"]
    assert "".join(step["token"] for step in trace) == "good day."
    assert all(0 < step["risk"] < 0.01 for step in trace)


def test_models_are_listed_and_found_by_names_with_slashes(serve):
    server = serve(served_model_name="org/tiny")
    assert [model.id for model in server.client().models.list()] == ["org/tiny"]
    assert server.client().models.retrieve("org/tiny").id == "org/tiny"
    assert server.http.get("/v1/").status_code == 200
    assert server.http.get("/version").json()["model"] == "org/tiny"
    assert server.http.get("/docs").status_code == 200


def test_the_description_of_the_api_is_true_about_errors_and_streams(polite):
    paths = polite.http.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/moderations",
        "/v1/safety/score",
        "/livez",
        "/readyz",
        "/version",
        "/metrics",
    }
    answers = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "422" not in answers
    assert answers["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
