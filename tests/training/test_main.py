"""The script `ballast-train` itself."""

import sys

import pytest

from training.__main__ import USER_ERROR, main


def test_a_missing_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "training.run", None)  # importing it raises ModuleNotFoundError
    assert main(["head"]) == USER_ERROR
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "pip install 'ballast[train]'" in said


def test_the_constrained_objective_needs_a_constraint(capsys):
    assert main(["constrain", "constraint=null"]) == USER_ERROR
    assert "the recipe has no constraint: set constraint={}, or use ballast-train sft" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "says"), [(None, "wrote made\n"), ("0", "wrote made\n"), ("1", "")])
def test_one_process_of_a_group_says_what_was_written(monkeypatch: pytest.MonkeyPatch, capsys, rank, says):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("training.merge.merge", lambda recipe, command: "made")
    assert main(["merge", "adapter=any"]) == 0
    assert capsys.readouterr().err == says
