import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.trace import LOGIT_LIMIT, Trace, probability

logits = st.floats(-30, 30) | st.just(math.nan)


def trace_of(values: list[float], smoothing: float = 1.0) -> Trace:
    trace = Trace(smoothing)
    for position, logit in enumerate(values, start=1):
        trace.add(position, logit)
    return trace


def logit_of(risk: float) -> float:
    return math.log(risk / (1 - risk))


def risk_by_definition(smoothed: list[float], patience: int) -> float:
    """The highest over the sequence of the lowest of `patience` in a row, and the last one if that is higher."""
    highest = smoothed[-1]
    for start in range(len(smoothed) - patience + 1):
        lowest = 1.0
        for offset in range(patience):
            lowest = min(lowest, smoothed[start + offset])
        highest = max(highest, lowest)
    return highest


@pytest.mark.parametrize(
    ("risks", "patience", "expected"),
    [
        # Lowest of three in a row: 0.2, 0.7, 0.6; the last one is 0.6.
        ([0.2, 0.9, 0.7, 0.8, 0.6], 3, 0.7),
        # Lowest of two in a row: 0.1, 0.1, 0.1, 0.3; the last one, 0.8, is higher.
        ([0.1, 0.9, 0.1, 0.3, 0.8], 2, 0.8),
        # A single high value never lasts for three; the last one counts.
        ([0.1, 0.9, 0.1, 0.2], 3, 0.2),
        # Shorter than the patience: only the last one counts.
        ([0.9, 0.4], 3, 0.4),
        # Patience 1 is the highest value.
        ([0.1, 0.9, 0.2], 1, 0.9),
    ],
)
def test_response_risk_by_hand(risks: list[float], patience: int, expected: float):
    trace = trace_of([logit_of(risk) for risk in risks])
    assert trace.response_risk(patience) == pytest.approx(expected)


@given(values=st.lists(logits, min_size=1, max_size=30), patience=st.integers(1, 5), smoothing=st.floats(0.05, 1))
def test_response_risk_is_what_its_definition_says(values: list[float], patience: int, smoothing: float):
    trace = trace_of(values, smoothing)
    smoothed = [assessment.smoothed for assessment in trace.assessments]
    assert trace.response_risk(patience) == risk_by_definition(smoothed, patience)


def test_without_assessments_there_is_no_response_risk():
    assert Trace(1.0).response_risk(3) is None


def test_smoothing_by_hand():
    # 4; then 0.25 * 0 + 0.75 * 4 = 3; then 0.25 * -1 + 0.75 * 3 = 2.
    trace = trace_of([4.0, 0.0, -1.0], smoothing=0.25)
    assert [a.smoothed_logit for a in trace.assessments] == pytest.approx([4.0, 3.0, 2.0])


@given(before=st.floats(-20, 20), after=st.floats(-20, 20), gap=st.integers(1, 40), smoothing=st.floats(0.01, 1))
def test_a_gap_weighs_as_much_as_the_same_logit_at_each_of_its_tokens(before, after, gap, smoothing):
    dense = trace_of([before] + [after] * gap, smoothing)
    sparse = trace_of([before], smoothing)
    sparse.add(1 + gap, after)
    assert sparse.assessments[-1].smoothed_logit == pytest.approx(dense.assessments[-1].smoothed_logit, abs=1e-6)


def test_the_raw_risk_is_not_smoothed():
    trace = trace_of([-8.0, 2.0], smoothing=0.1)
    assert trace.assessments[-1].risk == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("logit", [math.nan, math.inf, -math.inf])
def test_a_failed_head_is_certain_harm_whatever_came_before(logit: float):
    assert probability(logit) == 1.0
    failed = trace_of([-8.0, -8.0, logit], smoothing=0.1).assessments[-1]
    assert (failed.risk, failed.smoothed, failed.is_failed) == (1.0, 1.0, True)


def test_a_failure_stays_out_of_the_average():
    # -8, then 4 for two tokens: 0.25 * -8 + 0.75 * 4 = 1, as if nobody had assessed between.
    trace = trace_of([-8.0, math.nan, 4.0], smoothing=0.5)
    assert trace.assessments[-1].smoothed_logit == pytest.approx(1.0)


def test_nan_does_not_spoil_what_follows():
    trace = trace_of([math.nan] + [-8.0] * 50, smoothing=0.5)
    assert trace.assessments[-1].smoothed == pytest.approx(probability(-8.0))


@pytest.mark.parametrize(("logit", "limit"), [(1e9, LOGIT_LIMIT), (-1e9, -LOGIT_LIMIT)])
def test_one_extreme_logit_is_clamped(logit: float, limit: float):
    assert trace_of([logit]).assessments[0].smoothed_logit == limit


@given(logit=st.floats(allow_nan=False, allow_infinity=False))
def test_a_probability_is_never_0_or_1(logit: float):
    assert 0.0 < probability(logit) < 1.0


def test_assessments_only_move_forward():
    trace = trace_of([0.0, 0.0])
    with pytest.raises(ValueError, match="2 is not after 2"):
        trace.add(2, 0.0)


@pytest.mark.parametrize("smoothing", [0.0, -0.1, 1.1, math.nan])
def test_a_smoothing_outside_its_range_is_refused(smoothing: float):
    with pytest.raises(ValueError, match="smoothing must be in"):
        Trace(smoothing)


def test_a_failed_assessment_takes_no_weight_from_the_next_one():
    failed, skipped = Trace(smoothing=0.15), Trace(smoothing=0.15)
    for trace in (failed, skipped):
        trace.add(20, -8.0)
    failed.add(30, math.nan)
    assert failed.add(31, 8.0).smoothed_logit == pytest.approx(skipped.add(31, 8.0).smoothed_logit)
