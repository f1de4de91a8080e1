import json
import logging
import time

import pytest
import structlog

from server import log
from server.settings import Settings


def arrived(lines, event, **fields):
    """Wait until the server's thread has logged `event` with these fields."""
    end = time.monotonic() + 5
    wanted = {"event": event, **fields}.items()
    while not any(wanted <= line.items() for line in lines):
        assert time.monotonic() < end
        time.sleep(0.005)


KEYS = [{"name": "app", "key": "app-key"}]
KEY = {"authorization": "Bearer app-key"}
PREFLIGHT = {"origin": "https://app.example", "access-control-request-method": "POST"}


@pytest.fixture(scope="module")
def locked(serve_all):
    """A server that needs a key, takes short bodies, and may be called from one web page."""
    origins = (PREFLIGHT["origin"],)
    return serve_all(api_keys=KEYS, metrics_open=True, max_body_bytes=1024, cors_origins=origins)


@pytest.fixture
def configured(logging_as_before):
    """Configure logging for a test."""
    return lambda **changes: log.configure(Settings(**changes))


def test_a_request_is_logged_with_its_id_and_counts_and_without_its_text(polite):
    with structlog.testing.capture_logs() as lines:
        polite.http.post(  # the line is written after the last byte is sent
            "/v1/chat/completions",
            json={"model": "tiny", "messages": [{"role": "user", "content": "my darkest thought"}]},
            headers={"x-request-id": "id-1"},
        )
        arrived(lines, "request", request_id="id-1")
    (line,) = (line for line in lines if line.get("request_id") == "id-1")
    assert (line["endpoint"], line["status"], line["finish_reason"]) == ("/v1/chat/completions", 200, "stop")
    assert (line["completion_tokens"], line["seconds"] > 0) == (9, True)
    assert "darkest" not in str(lines)
    assert "good day" not in str(lines)


def test_an_unexpected_fault_is_logged_without_its_message(polite, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError(" ".join(["my", "darkest", "thought"]))

    monkeypatch.setattr(polite.engine, "submit", fail)
    with structlog.testing.capture_logs() as lines:
        assert polite.post().status_code == 500
        arrived(lines, "request")
    (line,) = (line for line in lines if line["event"] == "unexpected error")
    assert line["error"].startswith("ZeroDivisionError at ")
    assert "test_log.py" in line["error"]
    assert line["error"].endswith(" fail")
    assert "my darkest" not in str(lines)


def test_a_sane_request_id_is_echoed_and_another_replaced(polite):
    def echoed(sent):
        return polite.http.get("/livez", headers={"x-request-id": sent}).headers["x-request-id"]

    assert echoed("abc-123") == "abc-123"
    for sent in ("a" * 129, "a b", b"\xe9"):
        assert echoed(sent).startswith("req_")
    assert polite.http.get("/livez").headers["x-request-id"] != polite.http.get("/livez").headers["x-request-id"]


def test_probes_are_quiet(polite):
    with structlog.testing.capture_logs() as lines:
        polite.http.get("/livez", headers={"x-request-id": "probe"})
        arrived(lines, "request", request_id="probe", log_level="debug")


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "endpoint"),
    [
        ("GET", "/v1/models/a/b", {}, 401, "/v1/models/{model_id:path}"),
        ("POST", "/v1/chat/completions", {}, 401, "/v1/chat/completions"),
        ("DELETE", "/v1/chat/completions", {}, 401, "/v1/chat/completions"),
        ("DELETE", "/v1/chat/completions", {"headers": KEY}, 405, "/v1/chat/completions"),
        ("POST", "/v1/moderations", {"headers": KEY, "content": b" " * 2000}, 413, "/v1/moderations"),
        ("OPTIONS", "/v1/safety/score", {"headers": PREFLIGHT}, 200, "/v1/safety/score"),
        ("GET", "/docs", {"headers": KEY}, 200, "/docs"),
        ("GET", "/my/darkest/thought", {}, 401, "unmatched"),
        ("GET", "/my/darkest/thought", {"headers": KEY}, 404, "unmatched"),
    ],
)
def test_a_request_is_logged_and_counted_under_its_route_whoever_answers_it(
    locked, method, path, sent, status, endpoint
):
    sample = f'ballast_requests_total{{endpoint="{endpoint}",finish_reason="",status="{status}"}}'
    before = locked.metric(sample)
    with structlog.testing.capture_logs() as lines:
        assert locked.http.request(method, path, **sent).status_code == status
        arrived(lines, "request", method=method, endpoint=endpoint, status=status)
    assert "darkest" not in str(lines)
    assert locked.metric(sample) == before + 1


def test_a_method_that_is_not_of_http_is_not_logged(locked):
    with structlog.testing.capture_logs() as lines:
        locked.http.request("PURGE", "/v1/models", headers=KEY)
        arrived(lines, "request", method="", endpoint="/v1/models", status=405)


def test_whoever_asks_for_the_metrics_without_a_key_is_not_quiet(serve):
    server = serve(api_keys=KEYS)
    with structlog.testing.capture_logs() as lines:
        assert server.http.get("/metrics").status_code == 401
        arrived(lines, "request", endpoint="/metrics", status=401, log_level="info")


def test_json_lines_hold_the_events_of_the_server_and_of_libraries(configured, capsys):
    configured(log_format="json")
    structlog.get_logger("server").info("request", status=200)
    logging.getLogger("model.guarded_lm").warning("the head is %s", "cold")
    ours, theirs = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["status"], ours["level"]) == ("request", 200, "info")
    assert (theirs["event"], theirs["level"]) == ("the head is cold", "warning")


def test_lines_below_the_level_are_left_out(configured, capsys):
    configured(log_level="warning")
    structlog.get_logger("server").info("request")
    structlog.get_logger("server").warning("trouble")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_licence_that_forbids_commercial_use_is_said_at_the_start(serve, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr("model.checkpoint.SHIPPED", tmp_path)
    (tmp_path / "tiny" / "permissive").mkdir(parents=True)
    (tmp_path / "tiny" / "permissive" / "safety_config.json").touch()
    with structlog.testing.capture_logs() as lines:
        serve(lm=lambda: scripted("x", licence="CC-BY-NC-4.0"))
    (line,) = (line for line in lines if line["log_level"] == "warning")
    assert "non-commercial" in line["event"]
    assert "checkpoint=tiny/permissive" in line["event"]
    with structlog.testing.capture_logs() as lines:
        serve()
    assert [line for line in lines if line["log_level"] == "warning"] == []


def test_the_notice_names_no_checkpoint_that_does_not_ship(serve, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr("model.checkpoint.SHIPPED", tmp_path)
    with structlog.testing.capture_logs() as lines:
        serve(lm=lambda: scripted("x", licence="CC-BY-NC-4.0"))
    (line,) = (line for line in lines if line["log_level"] == "warning")
    assert "checkpoint=" not in line["event"]


@pytest.mark.parametrize(
    ("changes", "num_notices"),
    [
        ({"host": "0.0.0.0"}, 1),
        ({"host": "0.0.0.0", "api_keys": [{"name": "app", "key": "secret"}]}, 0),
        ({"host": "127.0.0.1"}, 0),
    ],
)
def test_a_server_that_anybody_can_reach_without_a_key_says_so_at_the_start(serve, changes, num_notices):
    with structlog.testing.capture_logs() as lines:
        serve(**changes)
    notices = [line["event"] for line in lines if line["log_level"] == "warning"]
    assert len(notices) == num_notices
    assert all("no api_keys" in notice and "0.0.0.0:8000" in notice for notice in notices)


def test_an_answer_that_the_engine_could_not_finish_is_logged_as_an_error(serve, scripted):
    server = serve(lm=lambda: scripted("good day.", fails_at=12))
    with structlog.testing.capture_logs() as lines:
        assert server.post().status_code == 503
        arrived(lines, "request", endpoint="/v1/chat/completions", status=503, finish_reason="error")
