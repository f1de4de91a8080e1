"""A disguise keeps the request and its label, whatever the label is."""

import random
import re

import pytest
import yaml

from evaluation.suite import TEXTS
from model.chat import Message
from training.config import Augment
from training.disguise import GROUP, disguise, disguised, shipped
from training.rows import Row

EVERY = Augment(disguise=1.0, disguise_weight=0.5)


def row(text: str, label: int | None, **changes) -> Row:
    fields = {"group": "g", "source": "s", "licence": "MIT", "messages": (Message("user", text),), "response": None}
    return Row(**{**fields, "request_label": label, "response_label": None, **changes})


@pytest.fixture
def rows() -> list[Row]:
    """Forty requests of either label, with the braces that a format string would trip over."""
    return [row(f"{'Steal' if number % 2 else 'Bake'} {{loaf}} l{'o' * number}f", number % 2) for number in range(80)]


def test_every_request_is_in_its_disguise_with_its_label(rows: list[Row]):
    made = disguised(rows, EVERY, seed=0)
    assert [one.request_label for one in made] == [original.request_label for original in rows]
    for original, one in zip(rows, made, strict=True):
        assert all(word in one.prompt for word in original.prompt.split())
        assert one.prompt != original.prompt
    assert {(one.group, one.response, one.response_label, one.request_weight) for one in made} == {
        (GROUP, None, None, 0.5)
    }


def test_each_template_and_ending_is_drawn_and_some_end_without_sense():
    rng = random.Random(0)
    texts = [disguise("Bake bread", rng) for _ in range(3000)]
    known = shipped()
    for template in known.templates:
        longest = max(re.split(r"\{\w+\}", template), key=len)
        assert any(longest in text for text in texts), template
    assert all(any(text.endswith(" " + ending) for text in texts) for ending in known.endings)
    alone = [text.removeprefix("Bake bread ") for text in texts if text.startswith("Bake bread ")]
    senseless = [text for text in alone if not text.startswith(("Begin", "Answer")) and text not in known.endings]
    assert len(senseless) > 300
    assert len(set(senseless)) == len(senseless)


def test_a_request_may_hold_the_marks_of_a_template():
    marks = "{first} or {second} or {request}"
    found = [disguise(marks, random.Random(seed)) for seed in range(200)]
    assert sum(marks in text for text in found) > 150  # but for those that take it in two


def test_no_scene_of_the_evaluation_is_learned():
    raw = yaml.safe_load((TEXTS / "scenes.yaml").read_text())
    scenes = [*raw["scenes"], *(turn["content"] for turns in raw["turns"] for turn in turns), *raw["asides"]]
    words = [re.findall(r"\w+", text.lower()) for text in scenes]
    seen = {tuple(text[start : start + 5]) for text in words for start in range(len(text) - 4)}
    for template in (*shipped().templates, *shipped().endings):
        ours = re.findall(r"\w+", template.lower())
        assert not seen & {tuple(ours[start : start + 5]) for start in range(len(ours) - 4)}, template


def test_every_template_holds_a_place_for_the_request():
    for template in shipped().templates:
        assert "{request}" in template or ("{first}" in template and "{second}" in template)


def test_the_share_is_drawn_without_regard_to_labels(rows: list[Row]):
    made = disguised(rows, Augment(disguise=0.5), seed=0)
    counts = [sum(one.request_label == label for one in made) for label in (0, 1)]
    assert all(10 <= count <= 30 for count in counts), counts
    assert disguised(rows, Augment(disguise=0.0), seed=0) == []


def test_what_is_not_trained_on_is_left_out(rows: list[Row]):
    held_out = [row("Bake bread", 0, part="validation"), row("Bake rolls", 0, part="calibration"), row("Bake", None)]
    assert disguised(held_out, EVERY, seed=0) == []


def test_the_seed_alone_decides(rows: list[Row]):
    first, again, other = (disguised(rows, EVERY, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
