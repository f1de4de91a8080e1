"""Judging what attacks released: shares by judge, a sheet to read, agreement."""

import json
from pathlib import Path

import pytest

from evaluation.judge import agreement, choose, main, read_labels
from evaluation.samples import Journal, Sample
from model.testing import write_tiny


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    found = Journal(tmp_path / "prefill.jsonl")
    for number, text in enumerate(["Take this", "Take that", "I cannot", ""] * 3):
        found.add(Sample(f"k{number}", "prefill 5", "none", f"do it {number}", "Yes", text))
    return found.path


def test_the_sheet_holds_random_samples_that_said_something(journal: Path):
    samples = list(Journal(journal))
    chosen = choose(samples, 5)
    assert len({one.key for one in chosen}) == 5
    assert all(one.text for one in chosen)
    assert choose(samples, 5) == chosen != choose(samples, 5, seed=1)
    assert len(choose(samples, 100)) == 9


def test_agreement_by_hand():
    # Of 4: both say harmful once, harmless once, and differ twice. F1 = 2 / (2 + 1 + 1); kappa = (0.5 - 0.5) / 0.5.
    judged = {"a": True, "b": False, "c": True, "d": False, "unread": True}
    found = agreement(judged, {"a": True, "b": False, "c": False, "d": True})
    assert found == "F1 0.500, kappa 0.000, 2 harmful against 2 (n = 4)"
    with pytest.raises(ValueError, match="none of the labelled"):
        agreement(judged, {"else": True})


def test_a_sheet_is_written_and_read_back_with_labels(journal: Path, tmp_path: Path, capfd):
    sheet = tmp_path / "sheet.jsonl"
    assert main([str(journal), "--sheet", str(sheet)]) == 0
    assert "prefill 5, none: success by phrases 0.500" in capfd.readouterr().out
    with pytest.raises(ValueError, match="line 1: harmful must be true or false, got None"):
        read_labels(sheet)
    rows = [json.loads(line) for line in sheet.read_text().splitlines()]
    labelled = [json.dumps(row | {"harmful": row["text"] != "I cannot"}) + "\n" for row in rows]
    sheet.write_text("".join(labelled))
    assert main([str(journal), "--labels", str(sheet)]) == 0
    assert "phrases and the reader: F1 1.000, kappa 1.000, 6 harmful against 6 (n = 9)" in capfd.readouterr().out


def test_a_classifier_judges_beside_the_phrases(journal: Path, tmp_path: Path, capfd):
    model, folder = write_tiny(tmp_path)
    assert main([str(journal), "--classifier", str(folder), "--model", str(model)]) == 0
    out = capfd.readouterr().out
    assert "prefill 5, none: success by classifier" in out
    assert "phrases and classifier: F1" in out


def test_wrong_input_is_a_clear_error(journal: Path, tmp_path: Path, capfd):
    assert main([str(tmp_path / "none.jsonl")]) == 1
    assert "no samples in" in capfd.readouterr().err
    assert main([str(journal), "--classifier", str(tmp_path / "none")]) == 1
    assert "evaluation.judge: " in capfd.readouterr().err
