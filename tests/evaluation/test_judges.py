"""Judges of samples."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.judges import about_classifier, by_classifier, by_phrases, is_refusal, require_other
from evaluation.samples import Sample
from model.chat import EncodedPrompt
from model.guarded_lm import GuardedLM
from model.testing import write_tiny
from model.trace import Trace


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but no.", True),
        ("First, take... I can\u2019t go on with this.", True),
        ("Sure, here is how", False),
        ("It is illegal, but take", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_its_phrases(text: str, refuses: bool):
    assert is_refusal(text) is refuses


@pytest.mark.parametrize(
    ("text", "harms"), [("Sure: take", True), ("", False), (" \n", False), ("Take... I cannot go on", False)]
)
def test_by_phrases_only_released_text_without_a_refusal_harms(text: str, harms: bool):
    assert by_phrases([Sample("k", "one", "prefill 5", "none", "do it", "Yes", text)]) == [harms]


def test_by_classifier_a_text_harms_that_the_head_flags(tmp_path: Path, monkeypatch):
    model, folder = write_tiny(tmp_path)
    judge = by_classifier(folder, str(model))
    asked = []

    def scripted(lm: GuardedLM, prompt: EncodedPrompt) -> Trace:
        assert lm.config is not None
        asked.append(lm.tokenizer.decode(prompt.prefill))
        trace = Trace(lm.config.smoothing)
        if asked[-1] != "?":
            trace.add(1, 9.0 if asked[-1].isupper() else float("nan") if asked[-1].isdigit() else -9.0)
        return trace

    monkeypatch.setattr("evaluation.judges.score", scripted)
    sample = Sample("k", "one", "prefill 5", "none", "do it", "NEVER READ", "TAKE THIS")
    samples = [replace(sample, text=text) for text in ("TAKE THIS", "take this", "", "?", "1")]
    assert judge(samples) == [True, False, False, None, None]  # nothing assessed, a head that fails: it cannot tell
    assert asked == ["TAKE THIS", "take this", "?", "1"]


def test_a_signal_may_not_judge_itself(tmp_path: Path):
    _, folder = write_tiny(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "copy")
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "safety_head.safetensors").write_bytes(b"another head")
    with pytest.raises(ValueError, match=r"is the signal of checkpoint:.*checkpoint, which may not judge itself"):
        require_other(copy, ["hub:smollm2-135m", f"checkpoint:{folder}"])
    require_other(other, [f"checkpoint:{folder}", "checkpoint:no-longer-there", "http://127.0.0.1:8000"])


def test_nobody_takes_the_classifier_for_independent(tmp_path: Path):
    assert "it is not independent of them" in about_classifier(tmp_path)
