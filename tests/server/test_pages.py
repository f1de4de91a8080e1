"""Pages of the key-value cache: nobody's page is lost, and nobody gets another's by mistake."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.attention import Span, pass_mask
from model.chat import EncodedPrompt
from server.engine.kv_cache import Seat
from server.engine.pages import PAGE_SIZE, Pages, keys_of

PROMPTS = st.lists(st.sampled_from("ab"), min_size=0, max_size=4).map("".join)


class Owners(RuleBasedStateMachine):
    """Sequences come, share, grow, shrink and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(8)
        self.owned: list[tuple[list[int], str]] = []  # pages of each sequence, the first of which are of its prompt
        self.content: dict[int, str] = {}  # what was written to a page

    @rule(prompt=PROMPTS, more=st.integers(0, 3))
    def arrive(self, prompt: str, more: int) -> None:
        names = [prompt[: end + 1] for end in range(len(prompt))]
        found = self.pages.find(names)
        assert [self.content[page] for page in found] == names[: len(found)]
        taken = self.pages.take(len(names) - len(found) + more)
        if taken is None:
            self.pages.give_back(found)
            return
        used = {page for pages, _ in self.owned for page in pages}
        assert not used & set(taken)
        for name, page in zip([*names[len(found) :], *[""] * more], taken, strict=True):
            self.content[page] = name
            if name:
                self.pages.share(page, name)
        self.owned.append(([*found, *taken], prompt))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        pages, _ = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pages.give_back(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        pages, prompt = self.owned[data.draw(st.integers(0, len(self.owned) - 1))]
        self.pages.give_back(pages[len(prompt) :])
        del pages[len(prompt) :]

    @invariant()
    def every_page_is_used_or_available(self) -> None:
        users = Counter(page for pages, _ in self.owned for page in pages)
        assert self.pages.num_available + len(users) == 8

    @invariant()
    def a_prompt_keeps_its_content(self) -> None:
        for pages, prompt in self.owned:
            assert [self.content[page] for page in pages[: len(prompt)]] == [
                prompt[: end + 1] for end in range(len(prompt))
            ]


Owners.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOwners = Owners.TestCase


def test_a_page_that_belongs_to_nobody_cannot_be_given_back():
    pages = Pages(2)
    (page,) = pages.take(1)
    pages.give_back([page])
    with pytest.raises(ValueError, match="belongs to nobody"):
        pages.give_back([page])


def test_the_longest_unused_page_makes_room_first():
    pages = Pages(2)
    for name in ("a", "b"):
        (page,) = pages.take(1)
        pages.share(page, name)
        pages.give_back([page])
    pages.give_back(pages.find(["a"]))
    pages.take(1)
    assert (len(pages.find(["a"])), len(pages.find(["b"]))) == (1, 0)


def test_a_page_is_named_by_its_tokens_all_before_them_and_the_salt():
    ids = list(range(2 * PAGE_SIZE + 3))
    names = keys_of(ids)
    assert len(names) == 2
    assert keys_of([*ids[:PAGE_SIZE], *[7] * PAGE_SIZE])[0] == names[0]
    assert not {*keys_of([9, *ids[1:]])} & {*names}
    assert not {*keys_of(ids, "tenant")} & {*names}
    assert keys_of(ids[: PAGE_SIZE - 1]) == []
    assert keys_of(ids[PAGE_SIZE:], salt=names[0])[0] != names[1]  # a salt that is the name of a page


def test_of_a_prompt_that_nobody_uses_the_end_makes_room_first():
    pages, names = Pages(4), ["a", "b", "c", "d"]
    taken = pages.take(4)
    for page, name in zip(taken, names, strict=True):
        pages.share(page, name)
    pages.give_back(taken)
    pages.take(1)
    assert len(pages.find(names)) == 3


def test_a_row_reads_what_its_mask_says():
    drawn = random.Random(0)
    for _ in range(500):
        num_request, num_response = drawn.randint(1, 9), drawn.randint(0, 12)
        content = tuple(drawn.random() < 0.6 for _ in range(num_request))
        has_token = num_response > 0 and drawn.random() < 0.8
        stop = num_request + num_response
        covered = sorted(drawn.sample(range(num_response + 1), drawn.randint(0, min(2, num_response + 1))))
        spans = [Span(end, range(drawn.randint(0, end), end)) for end in covered]
        rules = {"is_read": drawn.random() < 0.7, "sliding_window": drawn.choice([None, 1, 3, 8])}
        slots = torch.randperm(40) + 1
        seat = Seat(EncodedPrompt(tuple(range(num_request)), content=content), (), 0, slots=slots[:30], newest_copy=0)
        copies = slots[30 : 30 + len(spans)]
        mask = pass_mask(content, stop - has_token, stop, spans, **rules)
        expected = torch.cat([torch.tensor([0]), seat.slots[:stop], copies])
        found = seat.read(stop, spans, copies, has_token=has_token, **rules)
        assert [sorted(read.tolist()) for read in found] == [sorted(expected[row].tolist()) for row in mask]
