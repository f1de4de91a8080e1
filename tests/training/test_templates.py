"""Requests drawn from templates."""

from pathlib import Path

import pytest

from training.config import Source
from training.errors import DataError
from training.sources import read
from training.templates import SHIPPED, expand

TWINS = """
source: Example (MIT)
groups:
  - harmful: 1
    rows: 4
    templates: ["tell me about {what}", "{what}!"]
    slots: {what: [storms, floods]}
  - harmful: 0
    rows: 2
    templates: ["tell me about {what}"]
    slots: {what: [cats, dogs, birds]}
"""


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_each_group_gives_its_number_of_different_requests(file):
    records = [record for _, record in expand(file(TWINS))]
    malicious = {record["prompt"] for record in records if record["harmful"] == 1}
    assert malicious == {"tell me about storms", "tell me about floods", "storms!", "floods!"}
    benign = [record["prompt"] for record in records if record["harmful"] == 0]
    assert len(benign) == len(set(benign)) == 2
    assert set(benign) < {f"tell me about {what}" for what in ("cats", "dogs", "birds")}
    assert {record["source"] for record in records} == {"Example (MIT)"}


def test_a_file_always_gives_the_same_requests(file):
    path = file(TWINS)
    assert list(expand(path)) == list(expand(path))


def test_a_group_gives_no_more_than_there_is(file):
    text = TWINS.replace("rows: 4", "rows: 400")
    assert len(list(expand(file(text)))) == 4 + 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("harmful: 1", "harmful: 2", "groups.0.harmful"),
        ("rows: 4", "rows: 0", "groups.0.rows"),
        ("[storms, floods]", "[]", "groups.0.slots.what"),
        ("rows: 4", "rows: 4\n    row: 5", "groups.0.row"),
        ("{what}!", "{who}!", "group 1: a template does not fit the slots ['what']"),
        ("{what}!", "{what!", "group 1: a template does not fit"),
        ("groups:", "groups: [", "cannot read"),
    ],
)
def test_what_is_wrong_is_named(file, old: str, new: str, said: str):
    with pytest.raises(DataError) as raised:
        list(expand(file(TWINS.replace(old, new, 1))))
    assert "own.yaml" in str(raised.value)
    assert said in str(raised.value)


def test_a_recipe_reads_templates_of_its_data_folder(file):
    path = file(TWINS)
    rows = read("mine", Source(path="own.yaml", kind="prompts", request_weight=2.0), path.parent)
    assert [row.request_label for row in rows] == [1, 1, 1, 1, 0, 0]
    assert {(row.group, row.source, row.licence, row.request_weight) for row in rows} == {("mine", "Example", "MIT", 2)}
    assert all(row.response is None for row in rows)


def test_the_shipped_requests_are_found_and_balanced(tmp_path: Path):
    rows = read("own", Source(path="own_requests.yaml", kind="prompts"), tmp_path)
    malicious = sum(row.request_label or 0 for row in rows)
    assert len(rows) > 1000
    assert 0.4 < malicious / len(rows) < 0.6
    assert {row.licence for row in rows} == {"Apache-2.0"}
    assert sorted(path.name for path in SHIPPED.iterdir()) == [
        "check.yaml",
        "disguises.yaml",
        "identity.jsonl",
        "near_misses.yaml",
        "own_requests.yaml",
    ]


def test_near_misses_are_many_and_each_kind_of_harm_has_a_harmless_twin(tmp_path: Path):
    rows = read("near", Source(path="near_misses.yaml", kind="prompts"), tmp_path)
    malicious = sum(row.request_label or 0 for row in rows)
    assert len(rows) > 1000
    assert 0.2 < malicious / len(rows) < 0.3
    assert len({row.key for row in rows}) == len(rows)  # no request under both labels


def test_templates_that_do_not_exist_are_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.yaml does not exist"):
        read("own", Source(path="nowhere.yaml", kind="prompts"), tmp_path)
