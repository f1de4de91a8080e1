import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.detokenizer import REPLACEMENT
from model.holdback import Holdback, ResponseToken
from model.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()
texts = st.text(st.sampled_from("abcé🙂 "), max_size=30)
stops = st.lists(st.text(st.sampled_from("abcé"), min_size=1, max_size=4), max_size=3)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def holding(text: str, stop: tuple[str, ...] = ()) -> Holdback:
    holdback = Holdback(TOKENIZER, ids_of("hi "), stop)
    for token in ids_of(text):
        holdback.push(ResponseToken(token))
    return holdback


def cut(text: str, stop: list[str]) -> str:
    """Return `text` up to the stop string that is complete first, the earliest one among equals."""
    for end in range(1, len(text) + 1):
        found = [text.find(each) for each in stop if each in text[:end]]
        if found:
            return text[: min(found)]
    return text


@given(text=texts, stop=stops, steps=st.lists(st.integers(0, 6), max_size=60))
def test_the_releases_joined_are_the_text_up_to_the_first_stop_string(text, stop, steps):
    # Bytes arrive one at a time, and after each a random number of tokens stays held.
    holdback = Holdback(TOKENIZER, (), stop)
    released, tokens = "", []
    releasable = 0
    for index, token in enumerate(ids_of(text)):
        holdback.push(ResponseToken(token))
        if holdback.has_stopped:
            break
        held = steps[index] if index < len(steps) else 0
        releasable = max(releasable, len(holdback) - held)
        piece, left = holdback.release(releasable)
        released, tokens = released + piece, [*tokens, *left]
        assert REPLACEMENT not in piece
    piece, left = holdback.release(len(holdback), is_end=True)
    tokens += left
    assert released + piece == cut(text, stop)
    assert [token.token_id for token in tokens] == ids_of(text)[: len(tokens)]


@given(text=texts, stop=stops)
def test_no_release_before_the_end_shows_the_beginning_of_a_stop_string_that_follows(text, stop):
    holdback = Holdback(TOKENIZER, (), stop)
    released = ""
    for token in ids_of(text):
        holdback.push(ResponseToken(token))
        if holdback.has_stopped:
            break
        released += holdback.release(len(holdback))[0]
    assert cut(text, stop).startswith(released)


def test_only_the_releasable_tokens_leave():
    holdback = holding("abcdef")
    assert holdback.release(2)[0] == "ab"
    assert holdback.release(5)[0] == "cde"
    assert holdback.num_released == 5


def test_what_has_left_does_not_leave_again():
    holdback = holding("abc")
    holdback.release(2)
    assert holdback.release(2) == ("", ())
    assert holdback.release(1) == ("", ())


def test_tokens_leave_with_the_risk_that_was_noted():
    holdback = holding("ab")
    holdback.set_risk(1, 0.25)
    _, tokens = holdback.release(2)
    assert [token.risk for token in tokens] == [None, 0.25]


def test_the_beginning_of_a_stop_string_is_withheld_with_its_tokens():
    holdback = holding("done EN", stop=("END",))
    text, tokens = holdback.release(len(holdback))
    assert text == "done "
    assert len(tokens) == 5


def test_a_withheld_beginning_leaves_when_it_turns_out_to_be_none():
    holdback = holding("done EN", stop=("END",))
    holdback.release(len(holdback))
    holdback.push(ResponseToken(*ids_of("o")))
    assert holdback.release(len(holdback))[0] == "ENo"


def test_a_withheld_beginning_leaves_at_the_end():
    holdback = holding("done EN", stop=("END",))
    assert holdback.release(len(holdback), is_end=True)[0] == "done EN"


def test_the_stop_string_and_its_tokens_do_not_leave():
    holdback = holding("ab|cd|", stop=("|cd|",))
    text, tokens = holdback.release(len(holdback), is_end=True)
    assert holdback.has_stopped
    assert text == "ab"
    assert len(tokens) == 2


def test_a_stop_string_is_remembered_when_more_follows():
    holdback = holding("ab|cd", stop=("|",))
    assert holdback.has_stopped
    assert holdback.release(len(holdback), is_end=True)[0] == "ab"


def test_a_stop_string_of_several_bytes_is_found():
    assert holding("abé", stop=("é",)).has_stopped


def test_an_incomplete_character_waits_and_leaves_at_the_end():
    holdback = Holdback(TOKENIZER, ())
    for token in ids_of("aé")[:-1]:
        holdback.push(ResponseToken(token))
    assert holdback.release(2)[0] == "a"
    assert holdback.release(2, is_end=True)[0] == REPLACEMENT


def test_crop_withdraws_the_tokens_and_their_text():
    holdback = holding("abcdef")
    holdback.release(2)
    assert holdback.crop(4) == 2
    assert holdback.token_ids == ids_of("abcd")
    assert holdback.release(4, is_end=True)[0] == "cd"


def test_crop_never_takes_back_what_has_left():
    holdback = holding("abcdef")
    holdback.release(4)
    with pytest.raises(ValueError, match="token 4 has been released, cannot withdraw down to 3"):
        holdback.crop(3)


@given(text=texts, more=st.text(st.sampled_from("abcé🙂 "), min_size=1, max_size=10), data=st.data())
def test_after_a_crop_the_text_goes_on_as_if_the_rest_had_never_been(text, more, data):
    length = data.draw(st.integers(0, len(ids_of(text))))
    cropped, fresh = holding(text), Holdback(TOKENIZER, ids_of("hi "))
    cropped.crop(length)
    for token in ids_of(text)[:length]:
        fresh.push(ResponseToken(token))
    for token in ids_of(more):
        cropped.push(ResponseToken(token))
        fresh.push(ResponseToken(token))
    assert cropped.release(len(cropped), is_end=True) == fresh.release(len(fresh), is_end=True)


def test_half_a_character_left_by_a_crop_becomes_no_text():
    holdback = holding("aé")
    holdback.crop(2)
    text, tokens = holdback.release(2, is_end=True)
    assert text == "a"
    assert len(tokens) == 2


def test_a_crop_of_nothing_keeps_the_stop_string():
    holdback = holding("ab|", stop=("|",))
    assert holdback.crop(3) == 0
    assert holdback.has_stopped


def test_a_crop_before_the_stop_string_forgets_it():
    holdback = holding("ab|", stop=("|",))
    holdback.crop(2)
    assert not holdback.has_stopped
