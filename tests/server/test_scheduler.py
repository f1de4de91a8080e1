"""Which passes run in a step."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.pages import Pages
from server.engine.scheduler import REST, SHORT, Candidate, Pace, Size, plan

NUM_PAGES, PER_PAGE, PIECE = 8, 12, SHORT + 4


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


def test_a_short_prompt_goes_before_the_first_pieces_of_long_ones():
    long = [candidate(f"long{number}", number, 512) for number in range(1, 9)]
    found = plan([candidate("w", 0), *long, candidate("short", 9, SHORT + 8)], num_rows=513, num_available=9)
    assert found.run == ["w", "short"]


def test_what_is_being_written_has_steps_to_itself_between_the_pieces_of_a_prompt():
    pace, writing, long = Pace(), [candidate("a", 1, new=1), candidate("b", 2, new=1)], candidate("long", 0, 512)

    def sizes(candidates: list[Candidate], count: int, num_available: int = 9) -> list[int]:
        return [len(pace.choose(candidates, num_available=num_available)) for _ in range(count)]

    assert sizes([long, *writing], REST // 2 + 3) == [3, *[2] * (REST // 2), 3, 2]  # each step of the two is two rows
    assert sizes([long, *writing], 2, num_available=1) == [3, 3]  # they need two pages: others may have to give theirs
    assert sizes([long], 3) == [1, 1, 1]  # nobody else is there to wait for


def test_steps_that_nobody_waited_for_count():
    pace, writing, long = Pace(), [candidate("w", 0)], candidate("long", 1, 512)
    assert len(pace.choose([*writing, long], num_available=9)) == 2
    for _ in range(REST):
        pace.choose(writing, num_available=9)
    assert len(pace.choose([*writing, long], num_available=9)) == 2


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


@dataclass(eq=False)
class Sequence:
    """A request: it reads its prompt in pieces, writes, is rolled back once or never, and may leave early."""

    name: str
    comes: int
    num_prompt: int
    num_response: int
    rolls_back_at: int
    leaves: int
    pages: list[int] = field(default_factory=list)
    num_fed: int = 0
    num_known: int = 0
    num_written: int = 0
    num_passes: int = 0

    @property
    def size(self) -> Size:
        num_rows = min(PIECE, self.num_known - self.num_fed)
        return Size(num_rows, -(-(self.num_fed + num_rows) // PER_PAGE) - len(self.pages), len(self.pages))

    def go_on(self, pages: Pages) -> bool:
        """Have one pass; tell whether it was the last."""
        size = self.size
        taken = pages.take(size.num_new_pages)
        assert taken is not None
        self.pages += taken
        self.num_fed += size.num_rows
        self.num_passes += 1
        if self.num_fed == self.num_known:
            self.num_written += 1
            self.num_known += 1
            if self.num_written == self.rolls_back_at:
                kept = -(-self.num_prompt // PER_PAGE)
                pages.give_back(self.pages[kept:])
                del self.pages[kept:]
                self.num_fed, self.num_known = self.num_prompt, self.num_prompt + 2
        return self.num_written == self.num_response

    def lose(self, pages: Pages) -> None:
        pages.give_back(self.pages)
        self.pages, self.num_fed, self.num_passes = [], 0, 0


SEQUENCES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 60), st.integers(1, 24), st.integers(2, 27), st.integers(5, 60)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES)
def test_every_request_ends_and_every_page_comes_back(drawn: list[tuple[int, int, int, int, int]]):
    pages, pace = Pages(NUM_PAGES), Pace()
    coming = [Sequence(f"s{number}", *one) for number, one in enumerate(sorted(drawn))]
    running: list[tuple[int, Sequence]] = []
    ended: set[str] = set()
    for step in range(2000):
        for one in [one for one in coming if one.comes <= step]:
            coming.remove(one)
            one.num_known = one.num_prompt
            running.append((int(one.name[1:]), one))
        for arrival, one in [(arrival, one) for arrival, one in running if one.leaves == step]:
            one.lose(pages)
            running.remove((arrival, one))
            ended.add(one.name)
        if not running and not coming:
            break
        by_name = {one.name: (arrival, one) for arrival, one in running}
        if not by_name:
            continue
        every = [Candidate(one.name, arrival, one.size, one.num_passes) for arrival, one in running]
        candidates = pace.choose(every, num_available=pages.num_available)
        found = plan(candidates, num_rows=PIECE + len(running), num_available=pages.num_available)
        for name in found.evict:
            by_name[name][1].lose(pages)
        for name in found.run:
            if by_name[name][1].go_on(pages):
                by_name[name][1].lose(pages)
                running.remove(by_name[name])
                ended.add(name)
    assert len(ended) == len(drawn)
    assert pages.num_available == NUM_PAGES
