"""Wrong input gets a 400 that names the field, and the next request is served."""

import pytest
from pydantic import ValidationError

from server.protocol.chat import ChatRequest

JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def error_of(response, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", "0.5"),
        ("top_p", -0.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("seed", 1.5),
        ("n", 0),
        ("n", 17),
        ("n", 200),
        ("max_tokens", 0),
        ("max_completion_tokens", -1),
        ("min_tokens", -1),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"100000": 1}),
        ("logit_bias", {"²": 1}),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("top_logprobs", 2),
        ("model", None),
        ("messages", None),
        ("messages", []),
        ("messages", "hello"),
        ("metadata", ["a"]),
        ("add_generation_prompt", False),
        ("continue_final_message", True),
    ],
)
def test_a_value_that_cannot_be_honoured_is_a_400_that_names_its_field(polite, field, value):
    error = error_of(polite.post(**{field: value}))
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages must have at least 1 item, got 0"),
        ({"messages": "hello"}, "messages must be a list, got a string"),
        ({"messages": ["hello"]}, "messages[0] must be an object, got a string"),
        ({"messages": [USER] * 2049}, "messages must have at most 2048 items, got 2049"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}] * 2},
            "messages must have at most 2048 parts, got 2050",
        ),
        ({"metadata": dict.fromkeys("abcdefghijklmnopq", "x")}, "metadata must have at most 16 entries, got 17"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a string or a list, got 5"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0] must be an object, got a string"),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            "messages[0].role must be 'system', 'developer', 'user' or 'assistant', got 'usr'",
        ),
        ({"model": None}, "model must be a string, got null"),
        ({"stream": 1}, "stream must be true or false, got 1"),
        ({"stream_options": []}, "stream_options must be an object, got a list"),
        ({"temperature": "0.5"}, "temperature must be a number, got a string"),
        ({"temperature": True}, "temperature must be a number, got true"),
        ({"temperature": 2.5}, "temperature must be between 0 and 2, got 2.5"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 1_000_000}, "n must be at most 16, got 1000000"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"max_tokens": {}}, "max_tokens must be an integer, got an object"),
        ({"top_k": int("1" * 200)}, f"top_k must be between -1 and 1000000, got {'1' * 200}"),
        ({"n": -int("1" * 200)}, f"n must be at least 1, got -{'1' * 59}..."),
        ({"stop": 5}, "stop must be a string or a list of strings"),
        ({"stop": list("abcde")}, "stop must have at most 4 items, got 5"),
        ({"logit_bias": [5]}, "logit_bias must be an object, got a list"),
        ({"store": True}, "store is not supported; leave it out or send false"),
        (
            {"response_format": {"type": "json"}},
            'response_format is not supported; leave it out or send {"type": "text"}',
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_with_a_value_is_said_in_plain_words(polite, fields, message):
    assert error_of(polite.post(**fields))["message"] == message


@pytest.mark.parametrize(
    ("max_running", "max_waiting", "most"), [(1, 2, 3), (8, 64, 16)], ids=["by the queue", "by the setting"]
)
def test_more_choices_than_can_be_served_are_refused_with_the_bound_that_holds(serve, max_running, max_waiting, most):
    error = error_of(serve(max_running=max_running, max_waiting=max_waiting).post(n=1000))
    assert error["message"] == f"n must be at most {most}, got 1000"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([USER, {"role": "tool", "content": "x", "tool_call_id": "1"}], "messages[1].role"),
        ([USER, {"role": "function", "content": "x"}], "messages[1].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x", "name": "Ann"}], "messages[0].name"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls"),
        (
            [{"role": "user", "content": [IMAGE]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": "x", "refusal": "y"}], "messages[0].refusal"),
        (["hello"], "messages[0]"),
    ],
)
def test_a_message_that_cannot_be_read_is_a_400_that_names_its_place(polite, messages, param):
    assert error_of(polite.post(messages=messages))["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("audio", {"voice": "alloy"}),
        ("modalities", ["text", "audio"]),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("store", True),
        ("service_tier", "flex"),
    ],
)
def test_a_field_of_openais_that_would_change_the_meaning_is_refused_by_name(polite, field, value):
    error = error_of(polite.post(**{field: value}))
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": None, "response_format": {"type": "text"}},
        {"modalities": ["text"], "store": False, "service_tier": "auto", "reasoning_effort": None, "verbosity": None},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"temperature": None, "n": None, "stop": None, "max_tokens": None, "stream": None, "safety": None},
        {"max_tokens": 5, "max_completion_tokens": 5, "stream_options": None, "parallel_tool_calls": True},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    ],
)
def test_a_field_that_changes_nothing_is_accepted(polite, fields):
    assert polite.post(**fields).status_code == 200


def test_a_stream_option_that_is_not_honoured_is_refused(polite):
    error = error_of(polite.post(stream=True, stream_options={"include_obfuscation": True}))
    assert error["param"] == "stream_options.include_obfuscation"


def test_an_unknown_field_is_refused_with_the_nearest_known_one(polite):
    error = error_of(polite.post(temprature=1))
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")
    assert "'temperature'" in error["message"]


def test_an_empty_stop_string_is_refused(polite):
    assert error_of(polite.post(stop=""))["param"] == "stop[0]"


def test_two_different_lengths_are_refused(polite):
    assert error_of(polite.post(max_tokens=5, max_completion_tokens=6))["param"] == "max_tokens"


def test_more_tokens_at_least_than_at_most_are_refused(polite):
    assert error_of(polite.post(max_tokens=5, min_tokens=6))["param"] == "min_tokens"


def test_only_an_assistants_message_can_be_continued(polite):
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert error_of(polite.post(**fields))["param"] == "messages[0].role"
    alone = [{"role": "assistant", "content": "x"}]
    assert error_of(polite.post(messages=alone, **fields))["param"] == "messages"


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused_by_name(polite, literal):
    body = f'{{"model":"tiny","messages":[{{"role":"user","content":"x"}}],"temperature":{literal}}}'
    error = error_of(polite.http.post("/v1/chat/completions", content=body, headers=JSON))
    assert error["param"] == "temperature"
    assert "finite" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"model":"tiny","messages":[{"role":"user","content":"a\\ud800b"}]}', "messages[0].content"),
        (
            '{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"\\udfff"}]}]}',
            "messages[0].content[0].text",
        ),
        ('{"model":"tiny","messages":[{"role":"user","content":"x"}],"stop":"\\ud800"}', "stop[0]"),
        ('{"model":"tiny","messages":[{"role":"user","content":"x"}],"\\ud800":1}', "\\ud800"),
        ('{"model":"tiny","messages":[{"role":"user","content":"x"}],"logit_bias":{"\\ud800":1}}', "logit_bias"),
        ('{"model":"tiny","messages":[{"role":"\\ud800","content":"x"}]}', "messages[0].role"),
    ],
)
def test_a_lone_surrogate_is_a_400_that_names_its_place(polite, body, param):
    assert error_of(polite.http.post("/v1/chat/completions", content=body, headers=JSON))["param"] == param


def test_a_lone_surrogate_in_the_models_name_is_a_404(polite):
    body = '{"model":"\\ud800","messages":[{"role":"user","content":"x"}]}'
    error_of(polite.http.post("/v1/chat/completions", content=body, headers=JSON), 404)


@pytest.mark.parametrize(
    "body",
    ["", "{", "[]", "null", '"text"', "[" * 100_000, b"\xff\xfe{", "1" * 5000, '{"model": "tiny",}'],
    ids=["empty", "cut", "list", "null", "string", "nested", "bytes", "digits", "comma"],
)
def test_a_body_that_is_no_json_object_is_a_400(polite, body):
    error_of(polite.http.post("/v1/chat/completions", content=body, headers=JSON))
    assert polite.post().status_code == 200


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b'{"model": "\xff"}', "invalid_unicode", "the body is not valid text: byte 11 is not UTF-8"),
        (b'{"model": "' + "\u00e9".encode()[:1], "invalid_unicode", "byte 11 is not UTF-8 (unexpected end of data)"),
        (b"\xff\xfe{", "invalid_unicode", "byte 2 is not UTF-16"),
        (b'{"a":' * 100_000, "invalid_json", "nested too deeply"),
        (b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", "nested too deeply"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "invalid_json", "too many digits"),
    ],
    ids=["bytes", "cut", "utf-16", "open", "closed", "digits"],
)
def test_a_body_that_the_parser_cannot_read_is_a_400_that_says_why(polite, body, code, message):
    error = error_of(polite.http.post("/v1/chat/completions", content=body, headers=JSON))
    assert (error["code"], error["param"]) == (code, None)
    assert message in error["message"]
    assert polite.post().status_code == 200


def test_invalid_json_is_reported_with_its_place(polite):
    error = error_of(polite.http.post("/v1/chat/completions", content='{"model": }', headers=JSON))
    assert error["code"] == "invalid_json"
    assert "character 10" in error["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/moderations", "/v1/safety/score"])
@pytest.mark.parametrize(
    "sent", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "json", "", None]
)
def test_a_body_that_is_not_declared_as_json_is_a_415_that_says_what_to_send(polite, path, sent):
    """These are the types that a web page may send to another site without asking it first."""
    request = polite.http.build_request("POST", path, content='{"input": "hello"}')
    request.headers.pop("content-type", None)
    if sent is not None:
        request.headers["content-type"] = sent
    error = error_of(polite.http.send(request), 415)
    assert "`content-type: application/json`" in error["message"]
    assert error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("sent", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"])
def test_every_way_to_declare_json_is_accepted(polite, sent):
    body = {"content": '{"input": "hello"}', "headers": {"content-type": sent}}
    assert polite.http.post("/v1/moderations", **body).status_code == 200


def test_a_prompt_of_100000_tokens_is_refused_with_both_numbers(polite):
    """One token per byte, and 19 of the chat template."""
    error = error_of(polite.post(messages=[{"role": "user", "content": "a " * 50_000}]))
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "100019" in error["message"]
    assert polite.post().status_code == 200


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_body_over_the_limit_is_a_413(serve, announced):
    server = serve(max_body_bytes=2000)
    body = b'{"model": "' + b"x" * 3000 + b'"}'
    content = body if announced else iter([body[:1500], body[1500:]])
    error = error_of(server.http.post("/v1/chat/completions", content=content, headers=JSON), 413)
    assert "2000" in error["message"]
    assert server.post().status_code == 200


def test_another_model_is_a_404_that_names_what_is_served(polite):
    error = error_of(polite.post(model="gpt-5"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'tiny'" in error["message"]
    error_of(polite.http.get("/v1/models/gpt-5"), 404)


def test_an_unknown_path_and_a_wrong_method_are_errors_in_openai_form(polite):
    assert error_of(polite.http.get("/v2/nothing"), 404)["code"] == "not_found"
    response = polite.http.delete("/v1/models")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "GET"


def test_an_unexpected_fault_is_a_500_without_its_text_and_the_next_request_is_served(polite, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(polite.engine, "submit", fail)
    response = polite.post()
    error = error_of(response, 500)
    assert "secret" not in response.text
    assert error["code"] == "internal_error"
    assert response.headers["x-request-id"]
    monkeypatch.undo()
    assert polite.post().status_code == 200


def test_a_fault_of_the_engine_is_a_503_and_the_next_request_is_served(serve, scripted):
    server = serve(lm=lambda: scripted("good day.", fails_at=12))
    response = server.post()
    assert error_of(response, 503)["code"] == "engine_error"
    assert response.headers["retry-after"]
    assert "scripted fault" not in response.text
    assert server.post().status_code == 200


def test_more_tokens_than_the_context_has_left_are_refused_under_the_name_they_were_asked_by(polite):
    for field in ("max_tokens", "max_completion_tokens"):
        error = error_of(polite.post(**{field: 1000}))
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")
        assert "512" in error["message"]
        assert "1000" in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [("logit_bias", {str(token): 1 for token in range(1025)}, "at most 1024"), ("stop", "x" * 257, "at most 256")],
)
def test_what_would_slow_every_token_is_capped(polite, field, value, limit):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], field: value}
    response = polite.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(field)
    assert limit in response.json()["error"]["message"]


def test_a_token_id_of_a_thousand_digits_is_a_400(polite):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logit_bias": {"9" * 5000: 1}}
    assert polite.http.post("/v1/chat/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"tool_cals": 1}] * 2000},
        {"messages": [{"role": "user", "content": [{"a": 1}] * 2000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 75}] * 2000},
        {"metadata": {str(number): number for number in range(2000)}},
    ],
)
def test_the_first_wrong_item_of_a_long_field_is_the_last_that_is_looked_at(wrong):
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate({"model": "tiny", "messages": [USER], **wrong})
    assert raised.value.error_count() == 1
