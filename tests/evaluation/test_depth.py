"""How deep alignment goes, on the tiny model: divergence by position, refusals by depth, and the picture."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from evaluation.depth import by_position, divergences, draw, half_of, main, read, resolve
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
    generator = torch.Generator().manual_seed(0)
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
    left, middle, right = draw(read(out / "depth.json")).axes
    assert len(left.lines[0].get_xdata()) == 10
    assert [list(line.lines[0].get_xdata()) for line in middle.containers] == [[0, 4], [0, 4]]
    assert right.get_yticklabels()[1].get_text() == "'I cannot'"
    printed = capfd.readouterr().out
    assert "half of the KL of 10 tokens lies up to token " in printed
    assert "aligned, refused after 4 harmful tokens: 0.000" in printed
    assert "reference that begins with 'I cannot', harmful: " in printed


def test_a_response_without_a_word_is_no_refusal_and_without_a_judge_there_is_no_third_panel(
    tmp_path: Path, capfd, monkeypatch
):
    model, _ = write_tiny(tmp_path)
    rows = [json.dumps({"prompt": f"do {i}", "harmful_response": "abc"}) + "\n" for i in range(4)]
    (tmp_path / "prefill.jsonl").write_text("".join(rows))
    texts = ["", " ", "I cannot", "fine"]
    monkeypatch.setattr("evaluation.weights.completions", lambda pretrained, prompts, **_: enumerate(texts))
    get_peft_model(tiny_lm(), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(str(tmp_path / "adapter"))
    words = ["--model", str(model), "--adapter", str(tmp_path / "adapter"), "--data", str(tmp_path), "--depths", "0"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    printed = capfd.readouterr().out
    assert "aligned, refused after 0 harmful tokens: 0.250" in printed
    assert "begins with a refusal: not judged, for want of --judge" in printed
    assert len(draw(read(tmp_path / "out" / "depth.json")).axes) == 2


def test_an_adapter_or_a_checkpoint_is_a_name_of_its_own(tmp_path: Path):
    _, folder = write_tiny(tmp_path)
    assert resolve("somebody/else") == ("somebody/else", None)
    assert resolve(str(folder)) == ("smollm2-135m", None)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").touch()
    for name in (folder, folder / "adapter"):
        assert resolve(str(name)) == ("smollm2-135m", folder / "adapter")


def test_a_plain_model_alone_has_nothing_to_compare_with(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "eval").mkdir(parents=True)
    (tmp_path / "data" / "eval" / "prefill.jsonl").write_text(json.dumps({"prompt": "a", "harmful_response": "b"}))
    assert main(["--model", "smollm2-135m"]) == 1
    assert "or as --model an adapter or a checkpoint with one, got 'smollm2-135m'" in capfd.readouterr().err


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
