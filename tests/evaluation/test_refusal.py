"""Refusals by phrase."""

import pytest

from evaluation.refusal import is_refusal


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but no.", True),
        ("First, take... I can\u2019t go on with this.", True),
        ("Sure, here is how", False),
        ("It is illegal, but take", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_its_phrases(text: str, refuses: bool):
    assert is_refusal(text) is refuses
