"""Every documented file becomes rows; a bad row is named by file and line."""

from pathlib import Path
from typing import Any

import pytest

from training.config import Kind, Source
from training.errors import DataError
from training.rows import is_permissive, licence_of_weights
from training.sources import read


def labels(data: Path, kind: Kind, **changes: Any) -> set[tuple[bool, int | None, int | None]]:
    """Whether there is a response, and both labels, of all rows of a file."""
    path = {"own_answers": "benign_prompts"}.get(kind, kind)
    source = Source(f"{path}.jsonl", kind, **changes)
    return {(row.response is not None, row.request_label, row.response_label) for row in read("g", source, data)}


def test_labels_of_every_kind(data: Path):
    assert labels(data, "responses") == {(True, None, 0), (True, None, 1)}
    assert labels(data, "responses", request_label=1) == {(True, 1, 0), (True, 1, 1)}
    assert labels(data, "triplets") == {(True, 1, 1), (True, 1, 0)}
    assert labels(data, "refusals") == {(True, 1, 0)}
    assert labels(data, "instructions") == {(True, 0, 0)}
    assert labels(data, "prompts") == {(False, 0, None), (False, 1, None)}
    assert labels(data, "benign_prompts") == {(False, 0, None)}
    assert labels(data, "own_answers") == {(False, 0, 0)}


def test_only_rows_of_the_matching_source_are_taken(tmp_path: Path):
    write(
        tmp_path,
        '{"prompt": "a", "harmful": 0, "source": "One/x (MIT)"}',
        '{"prompt": "b", "harmful": 0, "source": "Two (MIT)"}',
    )
    rows = read("one", Source("rows.jsonl", "prompts", match="One", request_weight=2.0), tmp_path)
    assert [(row.group, row.source, row.licence, row.prompt, row.request_weight) for row in rows] == [
        ("one", "One/x", "MIT", "a", 2.0)
    ]


def test_prompts_of_other_files_are_left_out_however_they_are_spelt(tmp_path: Path):
    write(
        tmp_path,
        '{"prompt": "Bake bread.", "harmful": 0, "source": "One (MIT)"}',
        '{"prompt": "Bake a cake.", "harmful": 0, "source": "One (MIT)"}',
    )
    (tmp_path / "tuned.jsonl").write_text('{"prompt": "bake BREAD", "response": "Take flour", "complete": false}\n')
    (row,) = read("one", Source("rows.jsonl", "prompts", without=("tuned.jsonl",)), tmp_path)
    assert row.prompt == "Bake a cake."
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        read("one", Source("rows.jsonl", "prompts", without=("nowhere.jsonl",)), tmp_path)


def test_an_empty_response_leaves_nothing_to_learn(tmp_path: Path):
    write(tmp_path, '{"prompt": "a", "response": "", "harmful": 0, "source": "One (MIT)"}')
    assert read("one", Source("rows.jsonl", "responses"), tmp_path) == []


def test_rows_without_a_source_are_credited_by_the_recipe(tmp_path: Path):
    write(tmp_path, '{"prompt": "a", "harmful": 1}')
    (row,) = read("one", Source("rows.jsonl", "prompts", credit="Mine (CC-BY-4.0)"), tmp_path)
    assert (row.source, row.licence) == ("Mine", "CC-BY-4.0")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ('{"harmful": 1, "source": "One (MIT)"}', "field 'prompt' is missing; found ['harmful', 'source']"),
        ('{"prompt": 7, "harmful": 1, "source": "One (MIT)"}', "field 'prompt' must be a string, got int"),
        ('{"prompt": "\\ud800", "harmful": 1, "source": "One (MIT)"}', "lone surrogate"),
        ('{"prompt": "a", "source": "One (MIT)"}', "field 'harmful' is missing"),
        ('{"prompt": "a", "harmful": "yes", "source": "One (MIT)"}', "field 'harmful' must be 0 or 1, got 'yes'"),
        ('{"prompt": "a", "harmful": 1}', "field 'source' is missing"),
        ('{"prompt": "a", "harmful": 1, "source": "One"}', "source must end with its licence"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str):
    path = write(tmp_path, '{"prompt": "fine", "harmful": 0, "source": "One (MIT)"}', "", line)
    with pytest.raises(DataError) as caught:
        read("one", Source("rows.jsonl", "prompts"), tmp_path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)


def test_bytes_that_are_not_text_are_named_too(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not valid JSON"):
        read("one", Source("rows.jsonl", "prompts"), tmp_path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        read("one", Source("none.jsonl", "prompts"), tmp_path)


def test_licences():
    assert [is_permissive(name) for name in ("MIT", "Apache-2.0", "CC-BY-4.0")] == [True] * 3
    assert [is_permissive(name) for name in ("CC-BY-NC-4.0", "CC-BY-SA-4.0", "CC-BY-NC-SA-4.0", "GPL-3.0", "")] == [
        False
    ] * 5
    assert licence_of_weights({"MIT", "CC-BY-4.0"}) == "Apache-2.0"
    assert licence_of_weights({"MIT", "CC-BY-NC-4.0"}) == "CC-BY-NC-SA-4.0"
    assert licence_of_weights({"MIT", "GPL-3.0"}) is None


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
