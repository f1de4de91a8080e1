"""The journal of samples."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.samples import Journal, Sample, key_of

SAMPLE = Sample("k", "one", "prefill 5", "none", "do it", "Sure", "take\n\u2028this", is_stopped=True)


def test_what_was_added_is_there_when_the_journal_is_opened_again(tmp_path: Path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(SAMPLE)
    assert list(journal) == list(Journal(tmp_path / "journal.jsonl")) == [SAMPLE]
    assert "k" in Journal(tmp_path / "journal.jsonl")


@pytest.mark.parametrize("line", ["no json", '{"key": "k"}', "[]"])
def test_what_is_no_sample_is_named_by_its_line(tmp_path: Path, line: str):
    path = tmp_path / "journal.jsonl"
    Journal(path).add(SAMPLE)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"journal.jsonl, line 2: not a sample"):
        Journal(path)


def test_a_torn_last_line_is_dropped_and_the_next_sample_takes_its_place(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    Journal(path).add(SAMPLE)
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    journal = Journal(path)
    assert list(journal) == [SAMPLE]
    assert path.read_text() == whole + whole[:20]  # a reader leaves the file alone
    other = replace(SAMPLE, key="l")
    journal.add(other)
    assert list(Journal(path)) == [SAMPLE, other]


def test_a_key_follows_from_all_its_parts():
    assert key_of("a", 1) == key_of("a", 1) != key_of("a", 2)
