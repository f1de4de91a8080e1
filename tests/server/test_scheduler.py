"""Which passes run in a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import FEW, Candidate, plan


def candidate(name: str, arrival: int, num_rows: int = 1, new: int = 0, own: int = 0, passes: int = 0) -> Candidate:
    return Candidate(name, arrival, num_rows, new, own, passes)


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        name=st.uuids().map(str),
        arrival=st.integers(0, 99),
        num_rows=st.integers(1, 600),
        num_new_pages=st.integers(0, 8),
        num_pages=st.integers(0, 8),
        num_passes=st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one.arrival,
)


@given(CANDIDATES, st.integers(0, 40))
def test_a_plan_can_be_carried_out_and_the_first_runs(candidates: list[Candidate], num_available: int):
    by_name = {one.name: one for one in candidates}
    first = min(candidates, key=lambda one: one.arrival)
    others = [one for one in candidates if one is not first]
    if first.num_new_pages > num_available + sum(one.num_pages for one in others):
        with pytest.raises(ValueError, match="pages, there are"):
            plan(candidates, num_rows=640, num_available=num_available)
        return
    found = plan(candidates, num_rows=640, num_available=num_available)
    run, evicted = ([by_name[name] for name in names] for names in (found.run, found.evict))
    assert run[0] is first
    assert not {*found.run} & {*found.evict}
    assert len({*found.run}) == len(found.run)
    assert sum(one.num_new_pages for one in run) <= num_available + sum(one.num_pages for one in evicted)
    assert len(run) == 1 or sum(one.num_rows for one in run) <= 640
    assert all(one.num_pages for one in evicted)
    if evicted:
        assert min(one.arrival for one in evicted) > first.arrival


def test_what_is_being_written_goes_on_beside_one_piece_of_a_prompt():
    writing = [candidate(f"w{number}", number) for number in range(8)]
    prompts = [candidate("p1", 8, 512), candidate("p2", 9, 512)]
    found = plan([*prompts, *writing], num_rows=576, num_available=9)
    assert sorted(found.run) == sorted([*(one.name for one in writing), "p1"])


def test_a_short_prompt_goes_before_the_second_piece_of_a_long_one():
    long, short = candidate("long", 1, 512, passes=1), candidate("short", 2, FEW + 8)
    found = plan([candidate("w", 0), long, short], num_rows=513, num_available=9)
    assert found.run == ["w", "short"]


def test_the_last_gives_its_pages_to_the_first():
    some = [candidate("a", 0, new=2, own=1), candidate("b", 1, own=3), candidate("c", 2, own=1)]
    found = plan(some, num_rows=64, num_available=0)
    assert (found.run, found.evict) == (["a"], ["c", "b"])
    found = plan(some, num_rows=64, num_available=1)
    assert (found.run, found.evict) == (["a", "b"], ["c"])
