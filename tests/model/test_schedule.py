import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.schedule import Annealed, Every, First, Periodic, is_due, parse, positions


def assessed_positions(schedule, length: int) -> list[int]:
    """Return where a clear response of `length` tokens is assessed before its end."""
    positions = [0]
    for position in range(1, length + 1):
        if is_due(schedule, position, positions[-1], is_suspicious=False):
            positions.append(position)
    return positions[1:]


@pytest.mark.parametrize("schedule", [Every(), Periodic(3), Annealed(), First()])
@pytest.mark.parametrize("length", [0, 1, 9, 10, 45])
def test_the_positions_of_a_clear_response_are_those_where_one_is_due_and_its_end(schedule, length: int):
    assert positions(schedule, length) == sorted({*assessed_positions(schedule, length), length} - {0})


def test_every_assesses_each_token():
    assert assessed_positions(Every(), 4) == [1, 2, 3, 4]


def test_periodic_assesses_each_period():
    assert assessed_positions(Periodic(3), 10) == [3, 6, 9]


def test_annealed_is_dense_at_first_and_then_sparser():
    # Each token to 10, each 2nd to 30, each 5th to 100: 10 + 10 + 3 assessments up to token 45.
    expected = [*range(1, 11), *range(12, 31, 2), 35, 40, 45]
    assert assessed_positions(Annealed(), 45) == expected


@given(position=st.integers(0, 100_000))
def test_annealed_never_stops(position: int):
    # The published schedule ends; ours keeps at least one assessment per `floor` tokens.
    assert 1 <= Annealed().interval(position) <= 25


def test_first_assesses_nothing_before_the_end():
    assert assessed_positions(First(), 1000) == []


@given(gap=st.integers(1, 50), assessed=st.integers(0, 1000))
def test_a_suspicious_assessment_makes_every_schedule_dense(gap: int, assessed: int):
    for schedule in (Every(), Periodic(40), Annealed(), First()):
        assert is_due(schedule, assessed + gap, assessed, is_suspicious=True)


def test_nothing_is_assessed_twice():
    for schedule in (Every(), Periodic(2), Annealed(), First()):
        assert not is_due(schedule, 7, 7, is_suspicious=True)


def test_a_period_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Periodic(0)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("every", Every()), ("first", First()), ("annealed", Annealed()), ("periodic-12", Periodic(12))],
)
def test_a_schedule_has_a_name(name: str, schedule):
    assert parse(name) == schedule


@pytest.mark.parametrize("name", ["", "Every", "periodic", "periodic-0", "periodic--3", "periodic-x", "annealed-8"])
def test_another_name_is_refused_with_those_that_are_known(name: str):
    with pytest.raises(ValueError, match="there are every, first, annealed and periodic-N"):
        parse(name)


@given(position=st.integers(0, 10_000), longest=st.integers(1, 30))
def test_an_annealed_schedule_may_be_limited(position: int, longest: int):
    limited = parse("annealed", longest=longest).interval(position)
    assert limited == min(longest, Annealed().interval(position))
