"""Cached states are those of a plain forward pass, and an interruption costs one file at most."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.chat import ChatTemplate
from model.pretrained import Pretrained
from model.testing import FAMILIES, byte_tokenizer, tiny_lm
from training import states as states_module
from training.config import Cut, HeadRecipe
from training.corpus import assemble
from training.errors import RecipeError
from training.rows import Row
from training.states import Shard, compute, encode

CUT = Cut(request_tokens=96, response_tokens=20)


@pytest.fixture
def rows(recipe: HeadRecipe) -> list[Row]:
    found = assemble(recipe, lambda prompts: [f"An answer to: {row.prompt}" for row in prompts])
    return found[::6]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_a_plain_forward_pass(family: str, rows: list[Row], tmp_path: Path):
    pretrained = Pretrained("tiny", tiny_lm(family), byte_tokenizer())
    template = ChatTemplate(pretrained.tokenizer)
    found = compute(pretrained, rows, (1, -1), CUT, batch_tokens=500, cache=tmp_path / family)
    for index, row in enumerate(rows):
        prompt = encode(row, template, CUT)
        ids = torch.tensor([(*prompt.request, *prompt.prefill)])
        with torch.inference_mode():
            hidden = pretrained.model(ids, output_hidden_states=True).hidden_states
        plain = torch.cat([hidden[1][0], hidden[-1][0]], dim=-1)  # (T, 2 * D)
        expected = plain[len(prompt.request) - 1 :]
        torch.testing.assert_close(found[index].request.float(), expected[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found[index].response.float(), expected[1:], atol=2e-3, rtol=2e-3)


def test_a_request_is_cut_on_the_left_and_a_response_on_the_right(tiny: Pretrained, rows: list[Row]):
    row = next(row for row in rows if row.response is not None)
    template = ChatTemplate(tiny.tokenizer)
    whole, cut = encode(row, template, Cut(512, 512)), encode(row, template, Cut(10, 4))
    assert cut.request == whole.request[-10:]
    assert cut.prefill == whole.prefill[:4]


def test_a_rerun_computes_only_what_is_missing(
    tiny: Pretrained, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(states_module, "SHARD_ROWS", 2)
    calls: list[int] = []
    plain = states_module.forward

    def interrupted(*arguments: Any) -> Shard:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return plain(*arguments)

    def run(cache: Path) -> list[torch.Tensor]:
        found = compute(tiny, rows, (-1,), CUT, batch_tokens=500, cache=cache)
        return [torch.cat([state.request[None], state.response]) for state in map(found.__getitem__, range(len(found)))]

    monkeypatch.setattr(states_module, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "one")
    files = set((tmp_path / "one" / "states").iterdir())
    times = {file: file.stat().st_mtime_ns for file in files}
    assert len(files) == 3

    monkeypatch.setattr(states_module, "forward", plain)
    resumed, fresh = run(tmp_path / "one"), run(tmp_path / "two")
    assert {file: file.stat().st_mtime_ns for file in files} == times
    assert all(torch.equal(one, two) for one, two in zip(resumed, fresh, strict=True))


def test_other_rows_layers_or_cuts_are_never_mistaken_for_cached_ones(
    tiny: Pretrained, rows: list[Row], tmp_path: Path
):
    def num_files(found: list[Row], layers: tuple[int, ...], cut: Cut) -> int:
        compute(tiny, found, layers, cut, batch_tokens=500, cache=tmp_path / "cache")
        return len(list((tmp_path / "cache" / "states").iterdir()))

    one = [rows[0]]
    assert num_files(one, (-1,), CUT) == 1
    assert num_files(one, (-1,), CUT) == 1
    assert num_files([replace(one[0], response="Another answer")], (-1,), CUT) == 2
    assert num_files(one, (0,), CUT) == 3
    assert num_files(one, (-1,), Cut(95, 20)) == 4


def test_layers_and_cuts_beyond_the_model_are_refused(tiny: Pretrained, rows: list[Row], tmp_path: Path):
    with pytest.raises(RecipeError, match=r"layers -1 to 3, got \[4\]"):
        compute(tiny, rows, (4,), CUT, batch_tokens=500, cache=tmp_path)
    with pytest.raises(RecipeError, match="context is 512 tokens, got 768"):
        compute(tiny, rows, (-1,), Cut(512, 256), batch_tokens=500, cache=tmp_path)
