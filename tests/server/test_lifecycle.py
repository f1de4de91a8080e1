"""From a start that takes its time to a stop that lets requests finish."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import openai
import pytest
import structlog

from model.errors import WeightsNotFound
from model.testing import write_tiny
from server import __main__ as command
from server.engine.engine import EngineState
from server.engine.local import LocalEngine
from server.process import Process
from server.settings import Settings

LONG = "good day to you. " * 12


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_while_the_model_loads_the_server_is_alive_and_asks_to_come_back(serve, scripted):
    loaded = threading.Event()

    def load():
        assert loaded.wait(10)
        return scripted("good day.")

    server = serve(lm=load, wait=False)
    try:
        assert server.http.get("/livez").status_code == 200
        for response in (server.http.get("/readyz"), server.post(), server.post("/v1/safety/score")):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "not_ready"
            assert int(response.headers["retry-after"]) >= 1
    finally:
        loaded.set()
    wait_until(lambda: server.http.get("/readyz").status_code == 200)
    assert server.post().status_code == 200


def test_a_server_can_be_stopped_while_its_model_loads(serve, scripted):
    loaded = threading.Event()
    serve(lm=lambda: loaded.wait(10) and scripted("x"), wait=False)
    threading.Timer(0.5, loaded.set).start()


def test_a_model_that_does_not_load_leaves_the_server_alive_and_not_ready(serve):
    def load():
        raise WeightsNotFound("no weights here")

    server = serve(lm=load, wait=False)
    time.sleep(0.1)
    assert server.http.get("/livez").status_code == 200
    assert server.http.get("/readyz").status_code == 503


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
def test_a_client_that_disconnects_frees_the_engine_at_once(serve, stream):
    """Two choices of 12 times 17 tokens, 10 ms each, would take four seconds."""
    server = serve(LONG, slow=True)
    with leaving(server.url, stream=stream, n=2):
        wait_until(lambda: server.engine.stats().num_running == 2)
        time.sleep(0.1)
    left = time.monotonic()
    wait_until(lambda: server.engine.stats().num_running == 0)
    assert time.monotonic() - left < 0.5
    endpoint = 'endpoint="/v1/chat/completions",finish_reason="aborted"'
    wait_until(lambda: server.metric(f'ballast_requests_total{{{endpoint},status="499"}}') == 1)
    assert server.post(max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "json"])
def test_the_tokens_of_a_client_that_disconnects_are_counted_and_logged(serve, stream):
    server = serve(LONG, slow=True)
    with structlog.testing.capture_logs() as lines:
        with leaving(server.url, stream=stream, n=2):
            wait_until(lambda: server.metric("ballast_completion_tokens_total") >= 4)
        wait_until(lambda: any(line.get("finish_reason") == "aborted" for line in lines))
    (line,) = (line for line in lines if line.get("finish_reason") == "aborted")
    assert line["completion_tokens"] == server.metric("ballast_completion_tokens_total") < 2 * len(LONG)
    assert line["prompt_tokens"] == server.metric("ballast_prompt_tokens_total")
    assert line["prompt_tokens"] == server.post(max_tokens=1).json()["usage"]["prompt_tokens"]


@contextlib.contextmanager
def leaving(url, **fields):
    """Ask for a chat completion, and leave without an answer when the block ends."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        request = httpx2.Request("POST", url + "/v1/chat/completions", json=body)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + request.read())
        yield


def test_a_full_queue_is_a_429_that_says_when_to_come_back(serve):
    server = serve(LONG, slow=True, max_running=1, max_waiting=0)
    stream = server.chat("hello", stream=True)
    next(iter(stream))
    response = server.post()
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "overloaded"
    assert int(response.headers["retry-after-ms"]) == 1000 * int(response.headers["retry-after"]) > 0
    with pytest.raises(openai.RateLimitError):
        server.chat("hello", stream=True)
    stream.close()


def test_choices_that_do_not_all_fit_the_queue_leave_nothing_behind(serve):
    server = serve(LONG, slow=True, max_running=2, max_waiting=1)
    stream = server.chat("hello", stream=True)
    next(iter(stream))
    assert server.post(n=3).status_code == 429
    wait_until(lambda: server.engine.stats().num_waiting + server.engine.stats().num_running == 1)
    assert server.post(n=2, max_tokens=2).status_code == 200
    stream.close()


def test_more_choices_than_may_ever_run_and_wait_are_a_400_and_no_endless_429(serve):
    server = serve(max_running=2, max_waiting=0)
    response = server.post(n=3)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n"
    assert "at most 2, got 3" in response.json()["error"]["message"]
    assert server.post(n=2).status_code == 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def start_process(tiny):
    """Start `ballast-serve` as a process on a free port: the process, ready, and its address."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags: stack.enter_context(process(tiny, *flags))


@contextlib.contextmanager
def process(tiny, *more_flags):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    model, checkpoint = map(str, tiny)
    flags = ["--model", model, "--checkpoint", checkpoint, "--port", str(port), "--served-model-name", "tiny"]
    flags += ["--num-threads", "1", "--input-mode", "off", "--output-mode", "off", *more_flags]
    started = subprocess.Popen([sys.executable, "-m", "server", *flags], stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: started.poll() is not None or answer(url + "/readyz") == 200, 60)
    try:
        yield started, url
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def answer(url):
    try:
        return httpx2.get(url).status_code
    except httpx2.HTTPError:
        return None


def test_sigterm_lets_a_stream_finish_while_probes_and_new_requests_get_503(start_process):
    started, url = start_process()
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    long = {**body, "n": 4, "max_tokens": 450, "ignore_eos": True, "stream": True}
    with (
        httpx2.Client(base_url=url, timeout=30) as http,
        http.stream("POST", "/v1/chat/completions", json=long) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        wait_until(lambda: answer(url + "/readyz") == 503)
        assert answer(url + "/livez") == 200
        assert httpx2.post(url + "/v1/chat/completions", json=body).status_code == 503
        received = [line for line in lines if line]
    assert received[-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in received) == 4
    started.wait(15)
    assert "Traceback" not in started.stderr.read()


def test_a_stream_that_outlives_the_drain_ends_with_an_error_event(start_process):
    started, url = start_process("--drain-s", "0.2", "--log-format", "json")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    long = {**body, "n": 8, "max_tokens": 450, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", url + "/v1/chat/completions", json=long, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        started.send_signal(signal.SIGTERM)
        *_, error, done = (line for line in lines if line)
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"] == {
        "message": "the server is shutting down",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    started.wait(15)
    logged = [json.loads(line) for line in started.stderr]
    (request,) = (line for line in logged if line.get("endpoint") == "/v1/chat/completions")
    assert (request["status"], request["finish_reason"], request["completion_tokens"] > 0) == (200, "error", True)
    assert [line["event"] for line in logged if line["level"] == "error"] == []


def test_an_engine_that_is_gone_ends_the_process(logging_as_before, scripted):
    engine = LocalEngine(lambda: scripted("x"))
    process = Process(Settings(model="tiny", drain_s=1), engine)
    ended = threading.Event()

    def fail():
        wait_until(lambda: engine.state is EngineState.READY)
        engine._fail()  # as the engine's thread does where it cannot go on
        if not ended.wait(2):
            process.should_exit = True

    failing = threading.Thread(target=fail)
    failing.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process.serve_at(listener)
    ended.set()
    failing.join()
    assert str(process.failure) == "the engine has failed and does not go on; the log says why"


def test_a_port_in_use_is_one_clear_line(logging_as_before, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert command.main(["--port", str(taken.getsockname()[1])]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Address already in use" in line


def test_weights_that_are_missing_end_the_server_with_one_clear_line(logging_as_before, capsys, tiny):
    flags = ["--model", str(tiny[0] / "nothing"), "--checkpoint", str(tiny[1]), "--port", "0"]
    assert command.main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing does not exist" in line


def test_a_checkpoint_that_is_missing_ends_the_server_with_one_clear_line(logging_as_before, capsys, tiny):
    assert command.main(["--model", str(tiny[0]), "--checkpoint", "absent", "--port", "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no safety_config.json in 'absent'" in line
