"""Who reads whom: the rules R1 to R4, and the masks that they make."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention import Span, Windows, pass_mask, pass_places, window

WINDOWS = Windows(r1=3, r2=4, r3=2)
CONTENT = [False, True, True, False]
"""A request of two tokens of text between two of the template."""


@pytest.mark.parametrize("length", [0, 2, 3, 9])
def test_r1_of_a_malicious_request_the_first_tokens_are_read(length: int):
    assert list(window(length, WINDOWS, is_malicious=True)) == [0, 1, 2][:length]


def test_r2_of_a_benign_request_the_latest_tokens_are_read():
    assert list(window(9, WINDOWS, is_malicious=False)) == [5, 6, 7, 8]
    assert list(window(2, WINDOWS, is_malicious=False)) == [0, 1]


def test_r3_around_a_turning_point_both_sides_are_read():
    assert list(window(20, WINDOWS, is_malicious=False, turned_at=10)) == [6, 7, 8, 9, 10, 11]


def test_r3_reads_no_further_than_the_response_goes():
    assert list(window(11, WINDOWS, is_malicious=False, turned_at=10)) == [6, 7, 8, 9, 10]
    assert list(window(5, WINDOWS, is_malicious=False, turned_at=1)) == [0, 1, 2]


def test_a_turn_that_cleared_falls_back_to_r2():
    assert window(20, WINDOWS, is_malicious=False, turned_at=None) == range(16, 20)


def test_a_turning_point_outside_the_response_is_refused():
    with pytest.raises(ValueError, match="cannot turn at 6"):
        window(5, WINDOWS, is_malicious=False, turned_at=6)


def test_windows_without_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Windows(r2=0)


SPANS = [Span(0, range(0)), Span(2, range(2)), Span(4, range(1, 4))]


def spans_of(covered: list[int], r2: int) -> list[Span]:
    return [Span(length, window(length, Windows(r2=r2), is_malicious=False)) for length in covered]


def test_r4_cls_reads_itself_the_text_and_its_window_and_no_template_token():
    mask = pass_mask(CONTENT, 0, 8, [Span(4, range(2, 4))])
    assert mask[-1].tolist() == [
        False, False, True, True, False, False, False, True, True, True,
    ]  # fmt: skip


def test_request_tokens_never_read_cls_and_response_tokens_always_do():
    mask = pass_mask(CONTENT, 0, 6)
    assert mask[:, 0].tolist() == [False] * 4 + [True] * 2


@given(first=st.integers(0, 12), more=st.integers(1, 8), num_request=st.integers(1, 12))
def test_among_tokens_the_mask_is_causal(first: int, more: int, num_request: int):
    mask = pass_mask([True] * num_request, first, first + more)
    plain = torch.ones(first + more, first + more, dtype=torch.bool).tril()[first:]
    assert torch.equal(mask[:, 1:], plain)


def test_a_sliding_window_hides_old_tokens_and_never_cls():
    mask = pass_mask([True, True], 0, 8, sliding_window=3)
    assert mask[7].tolist() == [True, False, False, False, False, False, True, True, True]


def test_each_response_token_reads_the_newest_copy_that_has_not_seen_more_than_it():
    mask = pass_mask(CONTENT, 0, 9, SPANS)
    of_copies = mask[:9, 10:]
    assert not of_copies[:4].any()
    assert of_copies[4:].int().argmax(dim=1).tolist() == [0, 1, 1, 2, 2]
    assert of_copies[4:].sum(dim=1).tolist() == [1] * 5
    assert not mask[:, 0].any()  # slot 0 is older than all of them


def test_a_token_before_every_copy_of_its_pass_reads_slot_0():
    mask = pass_mask(CONTENT, 6, 9, [Span(4, range(1, 4))])  # response tokens number 3, 4 and 5
    assert mask[:3, 0].tolist() == [True, False, False]
    assert mask[:3, -1].tolist() == [False, True, True]


def test_where_reading_is_off_no_token_reads_cls():
    mask = pass_mask(CONTENT, 0, 9, SPANS, is_read=False)
    assert not mask[:9, 0].any()
    assert not mask[:9, 10:].any()
    assert mask[9:, 10:].any()


def test_copies_do_not_read_each_other():
    assert torch.equal(pass_mask(CONTENT, 0, 9, SPANS)[9:, 10:], torch.eye(3, dtype=torch.bool))


covers = st.lists(st.integers(1, 12), unique=True, max_size=5).map(lambda found: [0, *sorted(found)])


@given(covered=covers, num_response=st.integers(12, 14), r2=st.integers(1, 6))
def test_nothing_reaches_a_token_from_a_later_one_through_any_number_of_layers(
    covered: list[int], num_response: int, r2: int
):
    num_tokens = len(CONTENT) + num_response
    mask = pass_mask(CONTENT, 0, num_tokens, spans_of(covered, r2))[:, 1:].float()
    reach = torch.eye(len(mask))
    for _ in range(4):
        reach = ((mask + torch.eye(len(mask))) @ reach).clamp(max=1)
    assert not torch.triu(reach[:num_tokens, :num_tokens], diagonal=1).any()


@given(covered=covers, num_response=st.integers(12, 14), cut=st.integers(1, 11))
def test_two_passes_read_what_one_reads(covered: list[int], num_response: int, cut: int):
    num_request, spans = len(CONTENT), spans_of(covered, 3)
    border, stop = num_request + cut, num_request + num_response
    before = [span for span in spans if span.covers <= cut]
    after = [span for span in spans if span.covers > cut]
    whole = pass_mask(CONTENT, 0, stop, spans)
    one, other = pass_mask(CONTENT, 0, border, before), pass_mask(CONTENT, border, stop, after)
    assert torch.equal(whole[:border, 1 : 1 + border], one[:border, 1 : 1 + border])
    assert torch.equal(whole[border:stop, 1 : 1 + stop], other[: stop - border, 1 : 1 + stop])
    reads_old = whole[border:stop, 1 + stop : 1 + stop + len(before)]
    assert torch.equal(reads_old[:, :-1], torch.zeros_like(reads_old[:, :-1]))
    assert torch.equal(reads_old[:, -1], other[: stop - border, 0])  # the newest of them stands in slot 0
    assert torch.equal(whole[border:stop, 1 + stop + len(before) :], other[: stop - border, 1 + stop :])


@pytest.mark.parametrize("covered", [[3, 2], [2, 2], [6]])
def test_spans_out_of_order_or_after_the_end_are_refused(covered: list[int]):
    with pytest.raises(ValueError, match="must cover more and more of 5 response tokens"):
        pass_mask(CONTENT, 0, 9, [Span(length, range(length)) for length in covered])


def test_a_copy_stands_at_position_0_or_at_the_newest_token_that_it_covers():
    assert pass_places(0, 9, 4, SPANS, moves=False) == [*range(9), 0, 0, 0]
    assert pass_places(0, 9, 4, SPANS, moves=True) == [*range(9), 3, 5, 7]
