"""What an attacker sends: every request in every form, and nothing lost on the way."""

import pytest

from evaluation.attempts import (
    GRID,
    TURN,
    Attempt,
    conversations,
    diluted,
    direct,
    exploits,
    late,
    prefills,
    relapses,
    scenes,
    under,
)
from evaluation.rows import Row
from model.chat import Message
from model.testing import byte_tokenizer

ROWS = [Row("own", "how {to} do it?", "abcdefghijkl", 1), Row("own", "b", "abc", 1)]
HARMLESS = [Row("own", "", "Bread needs time and warmth.", 0), Row("own", "", "Rivers run to the sea.", 0)]


def test_a_response_begins_with_the_harmful_one_and_shorter_ones_are_left_out():
    (found,) = prefills(ROWS, 5, byte_tokenizer())
    assert (found.prompt, found.opening) == ("how {to} do it?", "abcde")
    assert found.messages == [
        {"role": "user", "content": "how {to} do it?"}, {"role": "assistant", "content": "abcde"},
    ]  # fmt: skip


def test_a_direct_request_is_all_that_is_said():
    assert [one.messages for one in direct(ROWS)] == [[{"role": "user", "content": row.prompt}] for row in ROWS]


def test_the_grid_is_the_published_one():
    found = exploits(ROWS[:1])
    assert len(found) == 20 + 20 + 9
    assert len({one.key for one in found}) == len(found)
    assert {setting["top_k"] for setting in GRID if "top_k" in setting} == {1, 2, 5, 10, 20, 50, 100, 200, 500}
    assert {setting["temperature"] for setting in GRID[:20]} == {step / 20 for step in range(1, 21)}
    assert {setting["top_p"] for setting in GRID[20:40]} == {step / 20 for step in range(1, 21)}


@pytest.mark.parametrize("make", [scenes, conversations])
def test_the_request_stands_where_its_place_is(make):
    found = make(ROWS)
    assert len({one.key for one in found}) == len(found)
    for one in found:
        said = "\n".join(turn.content for turn in one.turns if turn.role == "user")
        assert said.count(one.prompt) == 1 or one.prompt == "b"
        assert "{request}" not in said
        assert one.turns[-1].role == "user"


def test_a_scene_may_stand_in_another():
    one, nested = ([a for a in scenes(ROWS[:1]) if a.attack == name] for name in ("scene", "nested scenes"))
    assert len(one) == len(nested) >= 10
    inner = one[1].turns[0].content
    assert inner in nested[0].turns[0].content
    assert len(nested[0].turns[0].content) > len(inner)


def test_what_was_refused_is_asked_again():
    found = [one for one in conversations(ROWS[:1]) if one.attack == "asked again"]
    assert all("request" not in one.turns[1].content and one.turns[1].role == "assistant" for one in found)
    assert all(one.turns[0] == Message("user", ROWS[0].prompt) for one in found)


def test_a_response_may_begin_as_a_refusal():
    found = relapses(ROWS[:1])
    assert all(one.opening.startswith("I") for one in found)
    assert len({one.key for one in found}) == len(found) >= 2


@pytest.mark.parametrize("depth", [5, 30])
def test_harm_may_come_late(depth: int):
    (found,) = late(ROWS, HARMLESS, depth, byte_tokenizer())
    harmless, harmful = found.opening.rsplit("\n\n", 1)
    assert (len(harmless), harmful) == (depth, ROWS[0].response[:TURN])
    assert harmless[:5] in {"Bread", "River"}


def test_a_request_may_stand_in_harmless_text():
    found = diluted(ROWS, HARMLESS, 40, byte_tokenizer())
    for one, row in zip(found, ROWS, strict=True):
        before, request, after = one.turns[0].content.split("\n\n", 2)
        assert request == row.prompt
        assert 10 < len(before) < 30
        assert 10 < len(after) < 30


def test_too_little_harmless_text_is_an_error():
    with pytest.raises(ValueError, match="have 54 tokens together, 99 are needed"):
        diluted(ROWS, HARMLESS, 99, byte_tokenizer())


def test_every_attempt_is_made_under_every_policy():
    found = under(direct(ROWS), ["both", "none"], 7)
    assert [(one.prompt, one.policy, one.sampling["max_tokens"]) for one in found] == [
        (row.prompt, policy, 7) for policy in ("both", "none") for row in ROWS
    ]
    assert len({one.key for one in found}) == 4


def test_what_is_said_names_an_attempt():
    said = [(), (Message("user", "a"),), (Message("user", "b"),), (Message("assistant", "a"), Message("user", "a"))]
    assert len({Attempt("direct", "a", turns=turns).key for turns in said}) == 4
