"""The model's own answers: cached batch by batch, and the same again for the same seed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.chat import Message
from model.pretrained import Pretrained
from training import answers as answers_module
from training.answers import answer
from training.config import Answers
from training.rows import Row

SETTINGS = Answers(max_tokens=6, batch_size=2)


def row(prompt: str) -> Row:
    return Row("own", "own", "MIT", (Message("user", prompt),), None, 0, 0)


ROWS = [row("How are you today, my friend?"), row("Hi"), row("Name a colour."), row("Why?"), row("Where to?")]


def test_answers_come_in_the_order_of_the_prompts(tiny: Pretrained, tmp_path: Path):
    def ask(rows: list[Row], cache: str, seed: int = 0) -> list[str]:
        return answer(tiny, rows, SETTINGS, max_request_tokens=128, cache=tmp_path / cache, seed=seed)

    found = ask(ROWS, "one")
    assert len(found) == len(ROWS)
    assert ask(ROWS[::-1], "two") == found[::-1]
    assert ask(ROWS, "three", seed=1) != found


def test_a_rerun_generates_only_what_is_missing(tiny: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def ask() -> list[str]:
        return answer(tiny, ROWS, SETTINGS, max_request_tokens=128, cache=tmp_path, seed=0)

    first = ask()
    files = sorted((tmp_path / "answers").iterdir())
    assert len(files) == 3
    files[0].unlink()
    calls: list[object] = []
    plain = answers_module._generate

    def counted(pretrained: Pretrained, *rest: Any) -> list[str]:
        calls.append(1)
        return plain(pretrained, *rest)

    monkeypatch.setattr(answers_module, "_generate", counted)
    assert ask() == first
    assert len(calls) == 1


def test_an_answer_ends_before_the_first_token_that_ends_a_response(tiny: Pretrained, tmp_path: Path, monkeypatch):
    end, other, *word = (tiny.tokenizer.encode(text)[0] for text in ("z", "y", "o", "k"))
    monkeypatch.setattr(Pretrained, "eos_ids", frozenset({end, other}))  # not special, as in some models
    made = torch.tensor([[*word, other, end], [*word, *word]])
    monkeypatch.setattr(answers_module, "complete", lambda *arguments, **settings: made)
    for with_end, found in ((False, ["ok", "okok"]), (True, [f"ok{tiny.tokenizer.eos_token}", "okok"])):
        assert answers_module._generate(tiny, [(1,), (2,)], SETTINGS, 0, with_end) == found
