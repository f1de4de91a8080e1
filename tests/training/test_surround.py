"""Harmless text around a request, and turns after it, leave its label as it is."""

import pytest

from model.chat import Message
from training.config import Augment
from training.rows import Row
from training.surround import ASSENTS, GO_AHEADS, GROUP, surrounded

PASSAGE = "A keel keeps a boat upright, and ballast in it keeps it there when the wind blows from the side. " * 2
EVERY = Augment(surround=1.0, surround_weight=0.5)


def row(text: str, label: int | None, **changes) -> Row:
    fields = {"group": "g", "source": "s", "licence": "MIT", "messages": (Message("user", text),), "response": None}
    return Row(**{**fields, "request_label": label, "response_label": None, **changes})


@pytest.fixture
def rows() -> list[Row]:
    """One row with a harmless passage, and forty requests of either label."""
    tellers = [row("What is a keel?", 0, response=PASSAGE, response_label=0)]
    return [*tellers, *(row(f"{'Steal' if i % 2 else 'Bake'} loaf {i}x{'y' * i}", i % 2) for i in range(80))]


def test_every_form_keeps_the_request_and_its_label(rows: list[Row]):
    made = surrounded(rows, EVERY, seed=0)
    assert len(made) == len(rows)
    forms = set()
    for original, one in zip(rows, made, strict=True):
        texts = [message.content for message in one.messages]
        assert one.request_label == original.request_label
        assert original.prompt in texts[0]
        if len(texts) == 3:
            assert [message.role for message in one.messages] == ["user", "assistant", "user"]
            assert texts[0] == original.prompt
            assert texts[1] in ASSENTS
            assert texts[2] in GO_AHEADS
            forms.add("assented")
        else:
            before, _, after = texts[0].partition(original.prompt)
            assert PASSAGE.strip() in before + after
            forms.add((PASSAGE.strip() in before, PASSAGE.strip() in after))
    assert forms == {"assented", (True, False), (False, True), (True, True)}


def test_made_rows_have_no_response_and_the_configured_weight(rows: list[Row]):
    made = surrounded(rows, EVERY, seed=0)
    assert {(one.group, one.response, one.response_label, one.request_weight) for one in made} == {
        (GROUP, None, None, 0.5)
    }


def test_the_share_is_drawn_without_regard_to_labels(rows: list[Row]):
    made = surrounded(rows, Augment(surround=0.5), seed=0)
    counts = [sum(one.request_label == label for one in made) for label in (0, 1)]
    assert all(10 <= count <= 32 for count in counts), counts
    assert surrounded(rows, Augment(surround=0.0), seed=0) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"part": "validation"},
        {"request_label": 1},
        {"response_label": 1},
        {"response": "short"},
        {"response": "x" * 901},
    ],
    ids=["held out", "malicious request", "harmful response", "too short", "too long"],
)
def test_only_harmless_passages_of_trained_rows_are_used(changes: dict):
    teller = {"response": PASSAGE, "response_label": 0, "request_label": 0, **changes}
    label = teller.pop("request_label")
    assert surrounded([row("What is a keel?", label, **teller), row("Bake bread", 0)], EVERY, seed=0) == []


def test_the_seed_alone_decides(rows: list[Row]):
    first, again, other = (surrounded(rows, EVERY, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
