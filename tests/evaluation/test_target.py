"""Where a target is found, and what is said when it is not."""

import sys
from pathlib import Path

import pytest

from evaluation import target


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"])
def test_a_server_that_runs_is_used_as_it_is(tmp_path: Path, address: str):
    with target.serving(address, "any", tmp_path / "log") as found:
        assert found == "http://127.0.0.1:8000"
    assert not (tmp_path / "log").exists()


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


def test_a_server_that_was_started_is_stopped(tmp_path: Path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec {sys.executable} -m http.server $6\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "readyz").write_text("ready")
    monkeypatch.chdir(tmp_path)
    with target.serving("hub:nothing", "any", tmp_path / "log"):
        pid = int((tmp_path / "pid").read_text())
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
