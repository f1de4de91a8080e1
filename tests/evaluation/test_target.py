"""Where a target is found, and what is said when it is not."""

import sys
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError

from evaluation import scores, target
from evaluation.client import Server, connect
from model import checkpoint
from model.pretrained import DEFAULT_MODEL, NAMED
from model.testing import byte_tokenizer, write_tiny


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_server_that_runs_is_used_as_it_is(stub, tmp_path: Path, end: str):
    server = stub(lambda body: {})
    with target.serving(server.url + end, "any", tmp_path / "log") as found:
        assert connect(found).client.base_url == f"{server.url}/v1/"
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("more", [0, 1, None])
def test_a_server_that_counts_tokens_in_another_way_is_an_error(stub, client_of, more: int | None):
    """A byte is a token of the tiny model; the template's tokens are not compared."""

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        text = asked["messages"][0]["content"].encode()
        usage = {"prompt_tokens": 7 + len(text) + more * (len(text) > 9)} if more is not None else None
        return {"choices": [], "usage": usage}

    server = Server(client_of(stub(answer)), "stub")
    if more != 1:
        target.require_tokenizer(server, byte_tokenizer(), "tiny")
        return
    ours = len(f", {target.COUNTED}".encode())
    message = f"counts {ours + 1} tokens where the tokenizer of tiny counts {ours}: name that of .* with --tokenizer"
    with pytest.raises(ValueError, match=message):
        target.require_tokenizer(server, byte_tokenizer(), "tiny")


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_does_not_answer_the_request_tells_nothing_of_its_tokens(stub, client_of, status: int):
    server = stub(lambda asked: {"detail": "not so"})
    server.status_of = lambda body: status
    target.require_tokenizer(Server(client_of(server), "stub"), byte_tokenizer(), "tiny")
    assert server.asked


@pytest.mark.parametrize("name", ["", "smollm2-135m", "checkpoint:", "hub:", "ftp://host", "file:x"])
def test_anything_else_is_an_error_that_says_what_there_is(tmp_path: Path, name: str):
    message = "a target is http://ADDRESS, checkpoint:PATH or hub:NAME"
    with pytest.raises(ValueError, match=message), target.serving(name, "any", tmp_path / "log"):
        pass


def test_a_server_that_ends_at_once_is_an_error_with_the_end_of_its_log(tmp_path: Path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such model; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    message = "the server did not start: no such model"
    with pytest.raises(OSError, match=message), target.serving("hub:nothing", "any", tmp_path / "log"):
        pass


def test_a_server_that_was_started_is_asked_where_it_says_and_stopped(tmp_path: Path, monkeypatch):
    program, log = tmp_path / "python", tmp_path / "log"
    said = "ready at http://127.0.0.1:4321/v1"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nsleep 0.5\necho {said}\nexec sleep 100\n")
    program.chmod(0o755)
    log.write_text("ready at http://127.0.0.1:1234/v1\n")  # an earlier one, which is gone
    monkeypatch.setattr(sys, "executable", str(program))
    with target.serving("hub:nothing", "any", log) as address:
        assert address == "http://127.0.0.1:4321"
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_a_server_tells_its_model_and_its_thresholds(stub):
    server = stub(lambda body: {"request_risk": 0.1, "thresholds": {"response": {"block": 0.9}}})
    found = target.told(connect(server.url))
    assert found == {"id": "stub", "owned_by": "me", "shows": "risks", "thresholds": {"response": {"block": 0.9}}}
    server.answer = lambda body: {"request_risk": 0.1, "thresholds": {"response": {"block": 0.8}}}
    assert target.told(connect(server.url)) != found
    server.answer = lambda body: {"request_risk": None, "thresholds": None}
    assert target.told(connect(server.url))["shows"] == "flags"
    server.answer = lambda body: {"error": {"message": "what is that?"}}
    server.status_of = lambda body: 404 if "error" in body else 200
    assert target.told(connect(server.url)) == {"id": "stub", "owned_by": "me", "shows": "nothing", "thresholds": None}


@pytest.mark.parametrize("status", [401, 500])
def test_a_server_that_fails_is_not_taken_for_one_that_shows_nothing(stub, status: int):
    server = stub(lambda body: {"error": {"message": "no"}})
    found = connect(server.url)
    server.status_of = lambda body: status if "error" in body else 200
    with pytest.raises(APIStatusError):
        target.told(found._replace(client=found.client.with_options(max_retries=0)))
    with pytest.raises(APIStatusError):
        scores.can_score(found.client.with_options(max_retries=0), found.model)


def test_the_fingerprint_is_that_of_what_is_served(tmp_path: Path):
    model, folder = write_tiny(tmp_path)
    found = {kind: target.fingerprint(f"{kind}:{path}") for kind, path in (("hub", model), ("checkpoint", folder))}
    (folder / "README.md").write_text("not served")
    (model / "metrics.json").write_text("nor is this")
    assert target.fingerprint(f"hub:{model}") == found["hub"]
    assert target.fingerprint(f"checkpoint:{folder}") == found["checkpoint"]
    (model / "model.safetensors").write_bytes(b"others")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"trained again")
    assert target.fingerprint(f"hub:{model}") != found["hub"]
    assert target.fingerprint(f"checkpoint:{folder}") != found["checkpoint"]
    assert target.fingerprint("http://127.0.0.1:8000") is None
    assert target.fingerprint(f"hub:{DEFAULT_MODEL}") == NAMED[DEFAULT_MODEL].sha256


def test_every_shipped_checkpoint_has_a_fingerprint_of_its_own():
    names = checkpoint.shipped()
    assert len({target.fingerprint(f"checkpoint:{name}") for name in names}) == len(names)


def test_a_model_of_the_hub_is_known_by_its_commit(monkeypatch):
    cached = {"me/model": "/cache/models--me--model/snapshots/0123abc/config.json"}
    monkeypatch.setattr(target, "try_to_load_from_cache", lambda name, file: cached.get(name))
    assert target.fingerprint("hub:me/model") == "0123abc"
    assert target.fingerprint("hub:me/other") is None
