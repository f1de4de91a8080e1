import pytest

from model.chat import Message
from training.config import Augment
from training.rephrase import FORMS, GROUP, deed, rephrased
from training.rows import Row


def row(text: str, label: int | None, **changes) -> Row:
    fields = {"group": "g", "source": "s", "licence": "MIT", "messages": (Message("user", text),), "response": None}
    return Row(**{**fields, "request_label": label, "response_label": None, **changes})


@pytest.mark.parametrize(
    ("request_text", "wanted"),
    [
        ("How do I repair a bicycle?", "repair a bicycle"),
        ("how can people learn to whistle", "learn to whistle"),
        ("What is the best way to stack wood?", "stack wood"),
        ("Teach me how to bake bread!", "bake bread"),
        ("Write a poem about bread", None),
        ("How to", None),
    ],
)
def test_the_deed_is_found_in_questions_of_the_kind_how_to(request_text, wanted):
    assert deed(request_text) == wanted


def test_benign_and_malicious_requests_are_rephrased_alike_and_keep_their_labels():
    rows = [row("How do I bake bread?", 0), row("How do I steal bread?", 1)]
    made = rephrased(rows, Augment(rephrase=3), seed=0)
    assert [one.request_label for one in made] == [0, 0, 0, 1, 1, 1]
    assert {one.group for one in made} == {GROUP}
    assert all(one.prompt in {form.format("bake bread") for form in FORMS} for one in made[:3])


def test_a_rephrased_row_has_no_response_and_the_configured_weight():
    made = rephrased([row("How do I bake bread?", 0, response="Mix.", response_label=0)], Augment(rephrase=1), seed=0)
    assert (made[0].response, made[0].response_label, made[0].request_weight) == (None, None, 0.5)


def test_held_out_and_unlabelled_requests_are_not_rephrased():
    rows = [row("How do I bake bread?", 0, part="validation"), row("How do I bake cakes?", None)]
    assert rephrased(rows, Augment(), seed=0) == []


def test_the_seed_alone_decides_the_forms():
    rows = [row("How do I bake bread?", 0)]
    first, again, other = (rephrased(rows, Augment(rephrase=4), seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
