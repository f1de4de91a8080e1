import socket

import openai
import pytest
from pydantic import SecretStr
from starlette.datastructures import Headers

from server.auth import KeyRing
from server.settings import ApiKey, Settings

KEYS = [
    {"name": "app", "key": "app-key"},
    {"name": "red team", "key": "red-key", "may_loosen": True, "expose_risk": "full"},
    {"name": "blind", "key": "blind-key", "expose_risk": "none"},
    {"name": "flagged", "key": "flag-key", "expose_risk": "flag"},
]
SCORE_INPUT = {"model": "tiny", "policy": {"input": {"mode": "score"}}}


@pytest.fixture(scope="module")
def locked(serve_all):
    """A server that needs a key."""
    return serve_all(api_keys=KEYS)


def ask(server, key, path="/v1/chat/completions", **fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "HARM"}], **fields}
    return server.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/tiny", "/metrics", "/docs/oauth2-redirect", "/version", "/nothing", "/v1/"]
)
def test_every_path_needs_a_key_once_there_is_one(locked, path):
    response = locked.http.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/docs", "/openapi.json"])
def test_the_probes_and_the_description_need_no_key(locked, path):
    assert locked.http.get(path).status_code == 200


@pytest.mark.parametrize(
    "header", ["Bearer wrong", "Basic app-key", "app-key", "Bearer", "Bearer app-key2", "Bearer é"]
)
def test_a_wrong_key_is_refused(locked, header):
    response = locked.http.get("/v1/models", headers={"authorization": header.encode("latin-1")})
    assert response.status_code == 401


def test_the_client_gets_in_with_its_key_and_raises_without(locked):
    assert locked.client("app-key").models.list().data[0].id == "tiny"
    with pytest.raises(openai.AuthenticationError):
        locked.client("other").models.list()


def test_a_key_that_does_not_say_sees_flags_alone_though_the_address_is_local(locked):
    body = ask(locked, "app-key", "/v1/safety/score").json()
    assert (body["request_risk"], body["flagged"]["request"], body["thresholds"]) == (None, True, None)
    metrics = locked.http.get("/metrics", headers={"authorization": "Bearer app-key"})
    assert metrics.status_code == 403


@pytest.mark.parametrize(
    ("host", "exposure"),
    [("127.0.0.1", "full"), ("::1", "full"), ("localhost", "full"), ("0.0.0.0", "flag"), ("me", "flag")],
)
def test_without_keys_exact_risks_are_for_callers_on_a_loopback_address(host, exposure):
    assert KeyRing(Settings(host=host)).access(Headers({"host": "127.0.0.1:8000"})).expose_risk == exposure
    assert KeyRing(Settings(host=host, expose_risk="none")).access(Headers({"host": "127.0.0.1"})).expose_risk == "none"


def test_metrics_can_be_open(serve):
    server = serve(api_keys=KEYS, metrics_open=True)
    assert server.http.get("/metrics").status_code == 200
    assert server.http.get("/v1/models").status_code == 401


def test_settings_never_show_a_key():
    settings = Settings(api_keys=[ApiKey(name="app", key=SecretStr("very-secret"))])
    assert "very-secret" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a_mode_may_be_loosened_with_a_key_that_may(locked):
    assert ask(locked, "red-key", moderation=SCORE_INPUT).json()["choices"][0]["finish_reason"] == "stop"


def test_a_mode_may_not_be_loosened_with_another_key(locked):
    response = ask(locked, "app-key", moderation=SCORE_INPUT)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "moderation.policy.input.mode"


def test_a_mode_may_not_be_loosened_without_keys_off_loopback(serve):
    server = serve(host="0.0.0.0")
    response = server.post(moderation={"model": "tiny", "policy": {"output": {"mode": "score"}}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "moderation.policy.output.mode"


LOOSEN = {"moderation": {"model": "tiny", "policy": {"output": {"mode": "score"}}}}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.8.9.1:80", "[::1]", "[::1]:8000"])
def test_a_caller_on_this_machine_is_trusted_without_keys(polite, host):
    response = polite.http.post("/v1/chat/completions", json={**CHAT, **LOOSEN}, headers={"host": host})
    assert response.status_code == 200
    assert response.json()["choices"][0]["safety"]["request_risk"] is not None


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "ballast.example:8000"},
        {"host": "localhost.evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "192.168.0.7:8000"},
        {"host": "0.0.0.0"},
        {"host": "[::2]:80"},
        {"host": "[::1"},
        {"host": ""},
        {"forwarded": "for=192.0.2.60"},
        {"x-forwarded-for": "192.0.2.60"},
        {"x-forwarded-host": "ballast.example"},
        {"x-real-ip": "192.0.2.60"},
        {"via": "1.1 proxy"},
    ],
    ids=lambda headers: "-".join(*headers.items()),
)
def test_a_caller_through_a_proxy_or_under_another_name_is_not_trusted(polite, headers):
    response = polite.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.json()["choices"][0]["safety"]["request_risk"] is None
    response = polite.http.post("/v1/chat/completions", json={**CHAT, **LOOSEN}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "moderation.policy.output.mode"
    assert polite.http.get("/metrics", headers=headers).status_code == 403


def test_two_names_at_once_are_not_trusted(polite):
    with socket.create_connection(("127.0.0.1", int(polite.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert connection.recv(100).split()[1] in (b"400", b"403")


def test_what_the_operator_exposes_is_for_every_caller_without_keys(serve):
    response = serve(expose_risk="full").http.post("/v1/chat/completions", json=CHAT, headers={"host": "a.example"})
    assert response.json()["choices"][0]["safety"]["request_risk"] is not None


def test_a_key_is_worth_the_same_through_a_proxy(locked):
    headers = {"authorization": "Bearer red-key", "host": "ballast.example", "x-forwarded-for": "192.0.2.60"}
    response = locked.http.post("/v1/chat/completions", json={**CHAT, **LOOSEN}, headers=headers)
    assert response.json()["choices"][0]["safety"]["request_risk"] is not None


def test_off_loopback_risks_are_only_flagged(serve):
    safety = serve(host="0.0.0.0").post().json()["choices"][0]["safety"]
    assert (safety["request_risk"], safety["response_risk"]) == (None, None)


def test_a_key_that_sees_flags_gets_no_numbers(locked):
    body = ask(locked, "flag-key", moderation={"model": "tiny"}).json()
    safety = body["choices"][0]["safety"]
    assert (safety["action"], safety["request_risk"], safety["response_risk"]) == ("refused", None, None)
    (result,) = body["moderation"]["input"]["results"]
    assert (result["flagged"], result["category_scores"]) == (True, {"unsafe": 1.0})
    assert body["moderation"]["output"]["results"][0]["category_scores"] == {"unsafe": 0.0}


def test_a_key_that_sees_nothing_gets_the_action_alone(locked):
    body = ask(locked, "blind-key", moderation={"model": "tiny"}).json()
    assert body["choices"][0]["safety"]["action"] == "refused"
    assert body["choices"][0]["safety"]["request_risk"] is None
    assert body["moderation"]["input"]["results"] == body["moderation"]["output"]["results"] == []


@pytest.mark.parametrize("key", ["flag-key", "blind-key"])
def test_a_trace_is_for_keys_that_see_exact_risks(locked, key):
    response = ask(locked, key, safety={"trace": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "safety.trace"
    assert "trace" in ask(locked, "red-key", safety={"trace": True}).json()["choices"][0]["safety"]


def test_scores_are_flags_alone_for_a_key_that_sees_flags(locked):
    body = ask(locked, "flag-key", "/v1/safety/score").json()
    assert body["flagged"] == {"request": True, "response": None}
    assert (body["request_risk"], body["response_risk"], body["thresholds"]) == (None, None, None)
    assert ask(locked, "flag-key", "/v1/safety/score", trace=True).status_code == 400
    client = locked.client("flag-key")
    assert client.moderations.create(input="HARM").results[0].category_scores.unsafe == 1.0


def test_scores_are_forbidden_for_a_key_that_sees_nothing(locked):
    assert ask(locked, "blind-key", "/v1/safety/score").status_code == 403
    with pytest.raises(openai.PermissionDeniedError):
        locked.client("blind-key").moderations.create(input="HARM")


def test_a_browser_may_ask_first_without_a_key_if_its_origin_is_allowed(serve):
    server = serve(api_keys=KEYS, cors_origins=("https://app.example",))
    headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert server.http.options("/v1/chat/completions", headers=headers).status_code == 200
    refused = server.http.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert server.http.options("/v1/models", headers={**headers, "origin": "https://evil.example"}).status_code == 400


@pytest.mark.parametrize(("key", "status"), [("red-key", 200), ("flag-key", 403), ("blind-key", 403)])
def test_metrics_hold_exact_risks_and_are_for_keys_that_may_see_them(serve, key, status):
    server = serve(api_keys=KEYS)
    assert server.http.get("/metrics", headers={"authorization": f"Bearer {key}"}).status_code == status


def test_a_key_that_may_see_nothing_sees_the_action_alone(serve):
    server = serve(api_keys=KEYS)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer blind-key"}).json()
    safety = answer["choices"][0]["safety"]
    assert {name for name, value in safety.items() if value is not None} == {"action"}
