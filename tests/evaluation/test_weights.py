"""What the weights alone do, measured on the tiny model."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evaluation.rows import Row
from evaluation.weights import main, perplexity, prefills, respond
from model.chat import ChatTemplate, Message
from model.pretrained import Pretrained, load
from model.testing import byte_tokenizer, tiny_lm, write_tiny


@pytest.fixture
def tiny() -> Pretrained:
    return Pretrained("tiny", tiny_lm(), byte_tokenizer())


def test_a_response_begins_with_the_harmful_one_and_shorter_ones_are_left_out(tiny):
    rows = [Row("a", "do it", "abcdef", 1), Row("a", "do it too", "abc", 1)]
    (found,) = prefills(rows, 5, tiny.tokenizer)
    assert tiny.tokenizer.decode(found.ids[-5:]) == found.opening == "abcde"
    request = ChatTemplate(tiny.tokenizer).encode([Message("user", "do it")]).request
    assert found.ids[:-5] == request
    assert len(prefills(rows, 0, tiny.tokenizer)) == 2


def test_responses_are_kept_and_only_missing_ones_are_made(tiny, tmp_path: Path, monkeypatch):
    asks = prefills([Row("a", f"do it {i}", "abcdef", 1) for i in range(5)], 2, tiny.tokenizer)
    out = tmp_path
    first = respond(tiny, asks[:3], out, max_tokens=4, batch_size=2)
    made: list[int] = []
    refusal = tiny.tokenizer.encode("I cannot")
    monkeypatch.setattr(
        "evaluation.completions.complete",
        lambda pretrained, prompts, max_tokens: made.append(len(prompts)) or [refusal] * len(prompts),
    )
    both = respond(tiny, asks, out, max_tokens=4, batch_size=2)
    assert made == [2]
    assert both[:3] == first
    assert [(one.prompt, one.opening, one.text) for one in both[3:]] == [
        ("do it 3", "ab", "I cannot"), ("do it 4", "ab", "I cannot"),
    ]  # fmt: skip
    respond(tiny, asks, out, max_tokens=5, batch_size=5)
    assert made == [2, 5]  # other lengths are other responses


def test_perplexity_is_that_of_all_response_tokens_together(tiny):
    rows = [Row("a", "hi", "abc", 0), Row("a", "ho", "de", 0), Row("a", "hm", "", 0)]
    losses = []
    for row in rows[:2]:
        request = ChatTemplate(tiny.tokenizer).encode([Message("user", row.prompt)]).request
        ids = [*request, *tiny.tokenizer.encode(row.response)]
        with torch.inference_mode():
            logs = tiny.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-float(logs[place - 1, ids[place]]) for place in range(len(request), len(ids))]
    found = perplexity(tiny, rows)
    assert found.value == pytest.approx(math.exp(sum(losses) / 5), rel=1e-4)
    ends = sorted(math.exp(sum(part) / len(part)) for part in (losses[:3], losses[3:]))
    assert (found.low, found.high, found.n) == (pytest.approx(ends[0], rel=1e-4), pytest.approx(ends[1], rel=1e-4), 2)


def test_perplexity_of_too_little_is_an_error(tiny):
    with pytest.raises(ValueError, match="needs two responses with a token, got 1"):
        perplexity(tiny, [Row("a", "hi", "", 0), Row("a", "hi", "abc", 0)])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    harmful = [{"prompt": f"do {i}", "harmful_response": "abcdefghij" * 2, "source": "Own (MIT)"} for i in range(4)]
    benign = [{"prompt": f"tell {i}", "source": "Own (MIT)"} for i in range(3)]
    tricky = [{"prompt": f"kill {i}", "harmful": i % 2, "source": "XSTest/a (MIT)"} for i in range(4)]
    for name, rows in (("prefill", harmful), ("benign_prompts", benign), ("prompts", tricky)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command_prints_every_share_with_its_n(data: Path, tmp_path: Path, capfd):
    model, _ = write_tiny(tmp_path)
    words = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--max-tokens", "3"]
    assert main([*words, "--depths", "0", "5", "--n", "3"]) == 0
    out = capfd.readouterr().out
    assert "prefill 0, not refused: 1.000 [0.439, 1.000] (n = 3)" in out
    assert "prefill 5, not refused" in out
    assert "Alpaca, declined: 0.000 [0.000, 0.561] (n = 3)" in out
    assert "XSTest-safe and NotInject, declined: 0.000 [0.000, 0.658] (n = 2)" in out


def test_what_the_plain_model_declines_too_is_told_apart(data: Path, tmp_path: Path, capfd, monkeypatch):
    """The tuned model declines all but one prompt, the plain one a single other."""
    model, _ = write_tiny(tmp_path)
    tuned = get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    words = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--max-tokens", "3"]

    def made(pretrained, prompts, *, max_tokens, batch_size):
        is_plain = all(torch.equal(a, b) for a, b in zip(pretrained.model.parameters(), plain, strict=True))
        answered = "tell 0" if not is_plain else "tell 1"
        for number, ids in enumerate(prompts):
            is_answered = answered in pretrained.tokenizer.decode(ids)
            yield number, "fine" if is_answered != is_plain else "I cannot"

    plain = [parameter.clone() for parameter in load(str(model), dtype=torch.bfloat16).model.parameters()]
    monkeypatch.setattr("evaluation.weights.completions", made)
    assert main([*words, "--adapter", str(tmp_path / "adapter"), "--depths", "0"]) == 0
    out = capfd.readouterr().out
    assert "Alpaca, declined: 0.667" in out
    assert "Alpaca, declined where the plain model answers: 0.333" in out
    assert "XSTest-safe and NotInject, declined where the plain model answers: 1.000" in out


def test_a_missing_file_is_one_line(tmp_path: Path, capfd):
    model, _ = write_tiny(tmp_path)
    assert main(["--model", str(model), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "evaluation.weights: " in capfd.readouterr().err
