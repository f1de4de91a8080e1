"""Responses after a harmless opening: what they begin with, and of what their label speaks."""

import pytest

from model.chat import Message
from training.augment import augment
from training.config import Augment
from training.onsets import GROUP, WORDS, opened
from training.rows import Row

ANSWER = " ".join(f"keel{i}" for i in range(200))
EVERY = Augment(onset=1.0)


def words(text: str) -> int:
    return len(text.split())


def row(response: str | None, label: int | None, **changes) -> Row:
    fields = {"group": "g", "source": "s", "licence": "MIT", "messages": (Message("user", f"Why {response}?"),)}
    return Row(**{**fields, "response": response, "response_label": label, "request_label": 1, **changes})


TELLER = row(ANSWER, 0, request_label=0)


@pytest.fixture
def rows() -> list[Row]:
    """A harmless answer to a benign request, and eighty responses of either label to malicious ones."""
    return [TELLER, *(row(f"response {i}x{'y' * i}", i % 2, response_weight=3.0) for i in range(80))]


def test_a_response_stands_after_the_first_words_of_a_harmless_answer(rows: list[Row]):
    made = opened(rows, EVERY, seed=0, count=words)
    assert rows[0] is TELLER  # which no other answer can open
    for original, one in zip(rows[1:], made, strict=True):
        opening = one.response.removesuffix(f" {original.response}")
        assert ANSWER.startswith(opening)
        assert WORDS[0] <= words(opening) <= WORDS[1]
        assert one.opening_tokens == (words(opening) if original.response_label else 0)
        assert (one.group, one.messages, one.response_label) == (GROUP, original.messages, original.response_label)
        assert (one.request_label, one.response_weight) == (None, original.response_weight)
    assert len({one.opening_tokens for one in made}) > 10
    assert opened(rows, EVERY, seed=0, count=words) == made


def test_the_share_is_drawn_without_regard_to_labels(rows: list[Row]):
    made = opened(rows, Augment(onset=0.5), seed=0, count=words)
    counts = [sum(one.response_label == label for one in made) for label in (0, 1)]
    assert all(10 <= count <= 32 for count in counts), counts
    assert opened(rows, Augment(), seed=0, count=words) == []


def test_who_gets_an_opening_says_nothing_of_who_gets_a_history(rows: list[Row]):
    both = Augment(onset=0.5, history=0.5)
    openings = {one.messages for one in opened(rows, both, seed=0, count=words)}
    histories = {one.messages[-1:] for one in augment(rows, both, seed=0) if len(one.messages) > 1}
    assert openings - histories
    assert histories - openings


@pytest.mark.parametrize(
    "changes",
    [{"part": "validation"}, {"request_label": 1}, {"response_label": 1}, {"response": ""}],
    ids=["held out", "malicious request", "harmful", "empty"],
)
def test_only_harmless_answers_to_benign_training_requests_open_others(rows: list[Row], changes: dict):
    others = [row(**{"response": ANSWER, "label": 0, "request_label": 0, **changes}), *rows[1:]]
    assert opened(others, EVERY, seed=0, count=words) == []


@pytest.mark.parametrize(
    "changes",
    [{"part": "calibration"}, {"response_label": None}, {"response": None}, {"response": ""}],
    ids=["held out", "no label", "no response", "empty"],
)
def test_a_row_that_teaches_no_response_gets_no_opening(changes: dict):
    untaught, taught = row(**{"response": "response", "label": 1, **changes}), row("answer", 1)
    made = opened([TELLER, untaught, taught], EVERY, seed=0, count=words)
    assert [one.messages for one in made] == [taught.messages]
