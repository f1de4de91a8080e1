"""Who reads whom: the rules R1 to R4, and the masks that they make."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention import Windows, assessment_mask, token_mask, training_mask, window

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


def test_r4_cls_reads_itself_the_text_and_its_window_and_no_template_token():
    assert assessment_mask(CONTENT, range(2, 4)).tolist() == [
        True, False, True, True, False, False, False, True, True,
    ]  # fmt: skip


def test_request_tokens_never_read_cls_and_response_tokens_always_do():
    mask = token_mask(0, 6, num_request=4)
    assert mask[:, 0].tolist() == [False] * 4 + [True] * 2


@given(first=st.integers(0, 12), more=st.integers(1, 8), num_request=st.integers(1, 12))
def test_among_tokens_the_mask_is_causal(first: int, more: int, num_request: int):
    mask = token_mask(first, first + more, num_request)
    plain = torch.ones(first + more, first + more, dtype=torch.bool).tril()[first:]
    assert torch.equal(mask[:, 1:], plain)


def test_a_sliding_window_hides_old_tokens_and_never_cls():
    mask = token_mask(0, 8, num_request=2, sliding_window=3)
    assert mask[7].tolist() == [True, False, False, False, False, False, True, True, True]


def test_each_response_token_reads_the_newest_copy_that_has_not_seen_more_than_it():
    mask = training_mask(CONTENT, 5, [(0, range(0)), (2, range(2)), (4, range(1, 4))])
    assert mask[3:7, :3].any().item() is False
    assert mask[7:, :3].int().argmax(dim=1).tolist() == [0, 1, 1, 2, 2]
    assert mask[7:, :3].sum(dim=1).tolist() == [1] * 5


def test_copies_do_not_read_each_other():
    mask = training_mask(CONTENT, 5, [(0, range(0)), (2, range(2)), (4, range(1, 4))])
    assert torch.equal(mask[:3, :3], torch.eye(3, dtype=torch.bool))


covers = st.lists(st.integers(1, 12), unique=True, max_size=5).map(lambda found: [0, *sorted(found)])


@given(covered=covers, num_response=st.integers(12, 14), r2=st.integers(1, 6))
def test_nothing_reaches_a_token_from_a_later_one_through_any_number_of_layers(
    covered: list[int], num_response: int, r2: int
):
    windows = Windows(r2=r2)
    assessments = [(length, window(length, windows, is_malicious=False)) for length in covered]
    mask = training_mask(CONTENT, num_response, assessments)
    reach = torch.eye(len(mask), dtype=torch.float32)
    for _ in range(4):
        reach = ((mask.float() + torch.eye(len(mask))) @ reach).clamp(max=1)
    first = len(covered)
    tokens = reach[first:, first:]
    assert not torch.triu(tokens, diagonal=1).any()


@given(covered=covers, num_response=st.integers(12, 14))
def test_training_and_decoding_give_each_token_the_same_slots(covered: list[int], num_response: int):
    windows = Windows(r2=3)
    assessments = [(length, window(length, windows, is_malicious=False)) for length in covered]
    mask = training_mask(CONTENT, num_response, assessments)
    decoding = token_mask(0, len(CONTENT) + num_response, len(CONTENT))
    first = len(covered)
    assert torch.equal(mask[first:, first:], decoding[:, 1:])
    assert torch.equal(mask[first:, :first].any(dim=1), decoding[:, 0])
    for copy, (_, read) in enumerate(assessments):
        slots = assessment_mask(CONTENT, read)
        assert torch.equal(mask[copy, first : first + len(slots) - 1], slots[1:])
        assert not mask[copy, first + len(slots) - 1 :].any()


@pytest.mark.parametrize("covered", [[], [1], [0, 3, 2], [0, 2, 2]])
def test_assessments_out_of_order_are_refused(covered: list[int]):
    with pytest.raises(ValueError, match="must cover 0 response tokens first"):
        training_mask(CONTENT, 5, [(length, range(length)) for length in covered])
