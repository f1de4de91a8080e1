"""What the API says of itself is there for a browser without a key or a network, and it is true."""

import re

import pytest

KEYS = [{"name": "app", "key": "app-key"}]
REQUESTS = (
    "ChatRequest",
    "ScoreRequest",
    "ModerationRequest",
    "ChatMessage",
    "TextPart",
    "StreamOptions",
    "SidePolicy",
)
ALONE = {"top_logprobs": {"logprobs": True}, "min_tokens": {"max_tokens": 10}}
"""What must be sent with a field so that it is honoured."""


@pytest.fixture(scope="module")
def locked(serve_all):
    return serve_all(api_keys=KEYS)


@pytest.fixture(scope="module")
def described(polite):
    return polite.http.get("/openapi.json").json()


def operations(described):
    return {
        (path, method): operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }


def test_the_page_and_what_it_loads_come_from_this_server_without_a_key(locked):
    page = locked.http.get("/docs").text
    loaded = re.findall(r"""(?:src|href|url)[=:] ?['"]([^'"]+)""", page)
    assert "/openapi.json" in loaded
    assert len(loaded) == 4
    for address in loaded:
        assert address.startswith("/")
        assert locked.http.get(address).status_code == 200
    assert "://" not in page


@pytest.mark.parametrize(
    "path", ["/docs/", "/docs/assets/redoc.standalone.js", "/docs/assets/../../v1/models", "/docs/assets", "/redoc"]
)
def test_nothing_else_is_open_beside_the_page(locked, path):
    request = locked.http.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    assert locked.http.send(request).status_code == 401


def test_the_description_names_neither_keys_nor_settings(serve):
    server = serve(api_keys=KEYS, served_model_name="the-model-of-the-house", cors_origins=("https://a.example",))
    text = server.http.get("/openapi.json").text
    assert "app-key" not in text
    assert "the-model-of-the-house" not in text
    assert "a.example" not in text


def test_a_browser_is_told_how_a_key_is_sent_and_where_none_is_asked_for(locked):
    described = locked.http.get("/openapi.json").json()
    (name, scheme), *others = described["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"], others) == ("http", "bearer", [])
    for (path, method), operation in operations(described).items():
        is_open = locked.http.request(method, path.replace("{model_id}", "tiny")).status_code != 401
        assert is_open == ("security" not in operation), path
        assert operation.get("security", [{name: []}]) == [{name: []}]


def test_open_metrics_are_described_as_open(serve):
    described = serve(api_keys=KEYS, metrics_open=True).http.get("/openapi.json").json()
    assert "security" not in described["paths"]["/metrics"]["get"]
    assert "security" in described["paths"]["/version"]["get"]


def test_every_route_has_a_sentence_for_its_summary(described):
    for operation in operations(described).values():
        summary = operation["summary"]
        assert len(summary.split()) >= 4
        assert "\n" not in summary
        assert not operation["description"].startswith(summary)


def test_every_field_of_a_request_is_described(described):
    for name in REQUESTS:
        for field, schema in described["components"]["schemas"][name]["properties"].items():
            assert schema.get("description"), f"{name}.{field}"


def ranges(schema):
    """Return the fields of an object with the values at the ends of their range, and the next ones outside it."""
    for field, described in schema["properties"].items():
        for kind in described.get("anyOf", [described]):
            number, step = (int, 1) if kind.get("type") == "integer" else (float, 0.001)
            for end, sign in (("minimum", -1), ("maximum", 1)):
                if end in kind:
                    yield field, number(kind[end]), number(kind[end]) + sign * step


def test_the_described_ranges_are_those_that_hold(polite, described):
    found = list(ranges(described["components"]["schemas"]["ChatRequest"]))
    assert {field for field, _, _ in found} == {
        *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("n", "max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs"),
    }
    for field, last, beyond in found:
        error = polite.post(**{field: beyond, **ALONE.get(field, {})}).json()["error"]
        assert error["param"] == field
        if abs(last) < 1000:  # a million tokens at least are in the range, but in no context
            assert polite.post(**{field: last, **ALONE.get(field, {})}).status_code == 200, (field, last)


def test_the_described_range_of_a_bias_holds(polite, described):
    (bias, _) = described["components"]["schemas"]["ChatRequest"]["properties"]["logit_bias"]["anyOf"]
    bounds = bias["additionalProperties"]
    for last, beyond in ((bounds["minimum"], bounds["minimum"] - 1), (bounds["maximum"], bounds["maximum"] + 1)):
        assert polite.post(logit_bias={"5": last}).status_code == 200
        assert polite.post(logit_bias={"5": beyond}).json()["error"]["param"] == "logit_bias"
