"""What fine-tuning makes of rows of each kind."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from model.config import RefusalConfig
from training.dialogues import Dialogue, read_part
from training.errors import DataError
from training.rows import key_of
from training.tune_config import Part, TuneRecipe

OURS = RefusalConfig().prefix
ROWS: dict[str, list[dict[str, Any]]] = {
    "refusals": [{"prompt": "do it", "response": "No, thanks."}],
    "responses": [
        {"prompt": "do it", "response": "Sure: first", "harmful": 1},
        {"prompt": "bake it", "response": "Take flour", "harmful": 0},
    ],
}


def read(folder: Path, kind: str, **source: Any) -> list[Dialogue]:
    """Return the dialogues that a source of this kind gives."""
    rows = [{**row, "source": "Own (MIT)"} for row in ROWS[kind]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = TypeAdapter(Part).validate_python({"sources": {"rows": {"path": "rows.jsonl", "kind": kind, **source}}})
    recipe = TuneRecipe(name="own", data=str(folder), parts={"part": part}, validation=0.0)
    return read_part("part", part, recipe)


def test_a_refusal_is_the_rows_own_or_ours(tmp_path: Path):
    (theirs,) = read(tmp_path, "refusals")
    (ours,) = read(tmp_path, "refusals", response="own_refusal")
    assert theirs.response == "No, thanks."
    assert ours.response.startswith(OURS)
    assert {(one.request_label, one.response_label, one.harmful) for one in (theirs, ours)} == {(1, 0, None)}


def test_harmful_responses_become_beginnings_that_a_refusal_follows(tmp_path: Path):
    (found,) = read(tmp_path, "responses", response="own_refusal")
    assert (found.prompt, found.harmful) == ("do it", "Sure: first")
    assert found.response.startswith(OURS)
    assert (found.request_label, found.response_label) == (None, 0)


def test_labelled_responses_stay_as_they_are(tmp_path: Path):
    found = read(tmp_path, "responses", request_label=1)
    assert [(one.response, one.request_label, one.response_label) for one in found] == [
        ("Sure: first", 1, 1), ("Take flour", 1, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("refusals", {"response": "harmful_response"}, "one of ('refusal', 'own_refusal'), got 'harmful_response'"),
        ("refusals", {"request_label": 0}, "requests of refusals are malicious"),
        ("responses", {"response": "harmful_response"}, "one of ('refusal', 'own_refusal')"),
    ],
)
def test_choices_that_mean_nothing_are_explained(tmp_path: Path, kind: str, source: dict[str, Any], message: str):
    with pytest.raises(ValidationError) as caught:
        read(tmp_path, kind, **source)
    assert message in str(caught.value)


def test_no_row_left_is_an_error_that_names_the_part(tmp_path: Path):
    with pytest.raises(DataError, match="no row is left in the part 'part'"):
        read(tmp_path, "refusals", match="Nobody")


def test_a_row_without_a_prompt_is_the_response_that_a_head_would_be_taught():
    row = Dialogue("own", "MIT", "", "I would rather not", "GRAB it")
    assert row.key == key_of("GRAB it") != Dialogue("own", "MIT", "", "I would rather not", "GRAB them").key
