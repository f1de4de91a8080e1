"""A suite is read strictly, and its files are found."""

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from evaluation.attack import AS_THEY_ARE
from evaluation.suite import DEPTHS, SCORED, SHIPPED, TEXTS, Kind, load, require_files, shipped


def test_there_is_an_attack_of_every_kind():
    assert {*AS_THEY_ARE, *DEPTHS, *SCORED, "search"} == set(get_args(Kind))


def test_every_shipped_suite_opens_with_its_command_and_is_valid():
    names = "full paper price scenes search signal smoke stream tuned tuned_backdoor"
    assert shipped() == names.split()
    for name in shipped():
        assert load(name, Path("data")).measures
        opening = (SHIPPED / f"{name}.yaml").read_text().splitlines()[0]
        assert opening.startswith(f"# ballast-eval run {name} --target ")


def test_the_smoke_suite_needs_no_other_file():
    require_files(load("smoke", Path("nowhere")))


@pytest.mark.parametrize("name", ["smoke", "paper", "scenes", "search", "stream", "full", "tuned", "tuned_backdoor"])
def test_every_attack_is_reported_three_ways(name: str):
    for measure in load(name, Path("data")).measures.values():
        assert measure.kind in ("benign", *SCORED) or measure.policies == ("both", "output", "none")


def test_a_missing_file_is_named_with_its_measure_and_with_what_makes_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the measure direct needs .*direct.jsonl, which does not exist$"):
        require_files(load("paper", tmp_path))
    for name in ("direct", "prefill"):
        (tmp_path / f"{name}.jsonl").touch()
    made = f"python -m evaluation.answers --server ADDRESS --data {tmp_path}/benign_prompts.jsonl --out {tmp_path}/ans"
    with pytest.raises(ValueError, match=r"the measure late needs .*answers.jsonl, which does not exist; ") as caught:
        require_files(load("stream", tmp_path))
    assert made in str(caught.value)


def test_a_data_set_of_the_hub_is_no_file(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("measures: {a: {kind: direct, data: hub:me/set:test}}")
    suite = load(str(tmp_path / "mine.yaml"), tmp_path)
    require_files(suite)
    assert suite.measures["a"].data == Path("hub:me/set:test")


def test_nothing_that_is_asked_here_is_learned_anywhere():
    """The texts of the release: what trains on the one side, what measures on the other."""
    root = Path(__file__).parents[2]
    learned = "\n".join(path.read_text() for path in (root / "training" / "texts").glob("*.yaml"))
    asked = [json.loads(line)["prompt"] for path in TEXTS.glob("*.jsonl") for line in path.read_text().splitlines()]
    first = yaml.safe_load((TEXTS / "first_light.yaml").read_text())
    asked += [item["request"] for items in first.values() for item in items]
    said = {line.strip(' -"').lower() for line in learned.splitlines()}
    for prompt in asked:
        deed = prompt.lower().removeprefix("how do i ").removeprefix("how can i ").rstrip("?.")
        assert not {prompt.lower(), deed, deed + "?"} & said, prompt


def test_other_files_are_those_of_the_data_folder():
    assert load("paper", Path("data")).measures["prefill"].data == Path("data/prefill.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("measures: {a: {kind: direkt, data: x}}", "measures.a.kind: Input should be 'direct', "),
        ("measures: {a: {kind: direct, data: x, m: 3}}", "measures.a.m is not one of the keys ['kind', 'data', "),
        ("measures: {a: {kind: direct, data: x, max_token: 3}}", "did you mean 'max_tokens'?"),
        ("measures: {a: {kind: dircet, data: x}}", "did you mean 'direct'?"),
        (
            "{measures: {a: {kind: direct, data: x}}, measure: 1}",
            "measure is not one of the keys ['measures']; did you mean 'measures'?",
        ),
        ("measures: {a: {kind: late, data: x}}", "measures.a: filler, a file of harmless responses, is for"),
        (
            "measures: {a: {kind: prefill, data: x, filler: y}}",
            "measures.a: filler, a file of harmless responses, is for",
        ),
        ("measures: {a: {kind: direct, data: x, depths: [1]}}", "measures.a: depths are for ['prefill', 'late', "),
        ("measures: {a: {kind: prefill, data: x, label: 1}}", "measures.a: label is for requests and responses"),
        ("measures: {a: {kind: requests, data: x, suffix: y}}", "measures.a: suffix, policies, max_tokens, tokenizer"),
        ("measures: {a: {kind: requests, data: x, policies: [both]}}", "measures.a: suffix, policies, max_tokens"),
        ("measures: {a: {kind: onsets, data: x}}", "measures.a: filler, a file of harmless responses, is for"),
        ("measures: {a: {kind: prefill, data: x, depths: []}}", "measures.a: depths are for"),
        ("measures: {a|b: {kind: direct, data: x}}", "measures.a|b"),
        ("measures: {a: {kind: direct, data: x, policies: []}}", "measures.a.policies: "),
        ("measures: {}", "measures: "),
        ("measures: [", "while parsing"),
    ],
)
def test_a_mistake_is_named_by_file_and_key(tmp_path: Path, text: str, message: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: ") as caught:
        load(str(path), tmp_path)
    assert message in str(caught.value)


def test_an_unknown_suite_is_told_which_there_are():
    with pytest.raises(ValueError, match=r"no suite 'smoky'; shipped suites are \['full', 'paper', 'price'"):
        load("smoky", Path("data"))
