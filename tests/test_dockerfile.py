"""The image holds what the wheel needs and the weights that the code asks for."""

from pathlib import Path

import pytest

from model.pretrained import DEFAULT_MODEL, NAMED

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("file", ["Dockerfile", "Makefile"])
def test_the_default_weights_are_of_the_version_that_the_code_reads(file: str):
    weights = NAMED[DEFAULT_MODEL]
    assert f" {weights.distribution}=={weights.version}" in (ROOT / file).read_text(encoding="utf-8")


def test_the_build_context_holds_all_that_the_wheel_is_made_of():
    kept = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert {"model", "server", "training", "evaluation", "checkpoints", "pyproject.toml", "README.md"} <= kept
    assert all((ROOT / name).exists() for name in kept)
