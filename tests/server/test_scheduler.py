"""Which passes run in a step."""

from hypothesis import given
from hypothesis import strategies as st

from server.engine.scheduler import SHORT, Candidate, Size, plan


def candidate(name: str, arrival: int, num_rows: int = 1, new: int = 0, own: int = 0, passes: int = 0) -> Candidate:
    return Candidate(name, arrival, Size(num_rows, new, own), passes)


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        name=st.uuids().map(str),
        arrival=st.integers(0, 99),
        size=st.builds(Size, st.integers(1, 600), st.integers(0, 8), st.integers(0, 8)),
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
    found = plan(candidates, num_rows=640, num_available=num_available)
    run, evicted = ([by_name[name] for name in names] for names in (found.run, found.evict))
    assert run[0] is first
    assert not {*found.run} & {*found.evict}
    assert len({*found.run}) == len(found.run)
    if sum(one.size.num_own_pages for one in candidates if one is not first) + num_available < first.size.num_new_pages:
        assert {*evicted} == {*candidates} - {first}  # it is tried: pages that they share are there too
        return
    taken, freed = (sum(one.size.num_new_pages for one in run), sum(one.size.num_own_pages for one in evicted))
    assert taken <= num_available + freed
    long = [one for one in run[1:] if one.size.num_rows > SHORT]
    assert sum(one.size.num_rows for one in run) - max((one.size.num_rows for one in long), default=0) <= 640
    assert all(one.size.num_own_pages for one in evicted)
    if evicted:
        assert min(one.arrival for one in evicted) > first.arrival


def test_what_is_being_written_goes_on_beside_one_piece_of_a_prompt():
    writing = [candidate(f"w{number}", number) for number in range(8)]
    prompts = [candidate("p1", 8, 512), candidate("p2", 9, 512)]
    found = plan([*prompts, *writing], num_rows=576, num_available=9)
    assert sorted(found.run) == sorted([*(one.name for one in writing), "p1"])


def test_a_short_prompt_goes_before_the_second_piece_of_a_long_one():
    long, short = candidate("long", 1, 512, passes=1), candidate("short", 2, SHORT + 8)
    found = plan([candidate("w", 0), long, short], num_rows=513, num_available=9)
    assert found.run == ["w", "short"]


def test_the_last_gives_its_pages_to_the_first():
    some = [candidate("a", 0, new=2, own=1), candidate("b", 1, own=3), candidate("c", 2, own=1)]
    found = plan(some, num_rows=64, num_available=0)
    assert (found.run, found.evict) == (["a"], ["c", "b"])
    found = plan(some, num_rows=64, num_available=1)
    assert (found.run, found.evict) == (["a", "b"], ["c"])


def test_a_pass_of_more_rows_than_a_step_has_its_turn():
    writing = [candidate(f"w{number}", number) for number in range(3)]
    found = plan([*writing, candidate("long", 3, 900)], num_rows=576, num_available=9)
    assert "long" in found.run
