"""How deep alignment goes, on the tiny model: divergence by position, refusals by depth, and the picture."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evaluation.depth import by_position, divergences, half_of, main
from evaluation.intervals import Estimate
from evaluation.rows import Row
from model.chat import ChatTemplate, Message
from model.pretrained import Pretrained
from model.testing import byte_tokenizer, tiny_lm, write_tiny


@pytest.fixture
def pair() -> tuple[Pretrained, Pretrained]:
    """Two models that differ in their last layer norm."""
    aligned, reference = (Pretrained("tiny", tiny_lm(), byte_tokenizer()) for _ in range(2))
    with torch.no_grad():
        aligned.model.model.norm.weight.mul_(3.0)
    return aligned, reference


def test_a_model_does_not_differ_from_itself(pair):
    rows = [Row("a", "do it", "abc", 1)]
    assert divergences(pair[0], pair[0], rows, 10) == [pytest.approx([0.0, 0.0, 0.0], abs=1e-6)]


def test_the_divergence_is_that_before_each_token_of_the_response(pair):
    ((first, second),) = divergences(*pair, [Row("a", "do it", "abc", 1), Row("a", "nothing", "", 1)], 2)
    tokenizer = pair[0].tokenizer
    request = ChatTemplate(tokenizer).encode([Message("user", "do it")]).request
    for found, given in ((first, ""), (second, "a")):
        ids = torch.tensor([[*request, *tokenizer.encode(given)]])
        with torch.inference_mode():
            p, q = (one.model(ids).logits[0, -1].softmax(-1) for one in pair)
        assert found == pytest.approx(float((p * (p.log() - q.log())).sum()), abs=1e-5)
    assert first > 0.01


def test_the_mean_at_a_position_is_over_the_responses_that_reach_it():
    found = by_position([[1.0, 2.0, 9.0], [3.0, 4.0]])
    assert [(point.value, point.n) for point in found] == [(2.0, 2), (3.0, 2)]


def test_half_of_the_divergence_lies_up_to_the_first_position_that_reaches_it():
    curve = [Estimate(value, 0, 0, 5) for value in (3.0, 1.0, 1.0, 2.0)]
    assert half_of(curve) == 2
    with pytest.raises(ValueError, match="no two responses"):
        half_of([])


def test_the_command_writes_numbers_and_a_picture(tmp_path: Path, capfd):
    model, checkpoint = write_tiny(tmp_path)
    (tmp_path / "prefill.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"do {i}", "harmful_response": "abcdefghij", "source": "Own (MIT)"}) + "\n"
            for i in range(3)
        )
    )
    out = tmp_path / "out"
    tuned = get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)  # some random adapters say nothing, which counts as a refusal
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    words = ["--model", str(model), "--data", str(tmp_path), "--out", str(out), "--max-tokens", "3"]
    assert main(words) == 1
    assert "both models are the same: name --adapter" in capfd.readouterr().err
    words += ["--adapter", str(tmp_path / "adapter")]
    judge = ["--judge", str(checkpoint), "--judge-model", str(model)]
    assert main([*words, *judge, "--depths", "0", "4", "99"]) == 0
    found = json.loads((out / "depth.json").read_text())
    assert [point["n"] for point in found["divergence"]] == [3] * 10
    assert set(found["refused"]["aligned"]) == {"0", "4"}  # no response has 99 tokens
    assert [share["n"] for share in found["harmful"].values()] == [3] * 6
    assert (out / "depth.png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert "half of the KL of 10 tokens lies up to token " in printed
    assert "aligned, refused after 4 harmful tokens: 0.000" in printed
    assert "reference that begins with 'I cannot', harmful: " in printed


def test_other_vocabularies_do_not_compare(tmp_path: Path, capfd):
    model, _ = write_tiny(tmp_path)
    other = byte_tokenizer()
    other.add_tokens(["more"])
    tiny_lm().save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "prefill.jsonl").write_text(json.dumps({"prompt": "a", "harmful_response": "b"}) + "\n")
    words = ["--model", str(model), "--reference-model", str(tmp_path / "other"), "--data", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "have other vocabularies: their tokens do not compare" in capfd.readouterr().err


def test_a_missing_file_is_one_line(tmp_path: Path, capfd):
    model, _ = write_tiny(tmp_path)
    words = ["--model", str(model), "--reference-adapter", str(tmp_path), "--data", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "evaluation.depth: " in capfd.readouterr().err
