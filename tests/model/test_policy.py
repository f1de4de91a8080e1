"""The rules of acting, on random risks under every schedule.

`walk` drives a policy as `model.generation` and the engine do: one token at a time, an assessment
where one is due, and a last one before the end.
"""

import math
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.policy import Continue, Decision, Mode, Policy, Refuse, Rollback
from model.schedule import Annealed, Every, First, Periodic, Schedule, is_due
from model.trace import Trace

HIGH, LOW = 8.0, -8.0


@dataclass
class Walk:
    """Every decision of one response, with the number of tokens that existed when it was made."""

    trace: Trace
    decisions: list[tuple[int, Decision]] = field(default_factory=list)
    num_assessed: list[int] = field(default_factory=list)
    """Assessments that each decision could read."""

    def decide(self, policy: Policy, length: int, *, is_final: bool = False) -> None:
        self.decisions.append((length, policy.decide(self.trace, length, is_final=is_final)))
        self.num_assessed.append(len(self.trace.assessments))

    @property
    def last(self) -> Decision:
        return self.decisions[-1][1]

    @property
    def releasable(self) -> list[int]:
        return [decision.releasable for _, decision in self.decisions if isinstance(decision, Continue)]


def block(**changes) -> Policy:
    settings = {"request_block": 0.9, "response_block": 0.9, "onset": 0.5, "patience": 3, "lookback": 8}
    return Policy(input=Mode.BLOCK, output=Mode.BLOCK, **{**settings, **changes})


def walk(policy: Policy, schedule: Schedule, logits: list[float], smoothing: float = 1.0) -> Walk:
    done = Walk(Trace(smoothing))
    for length, logit in enumerate(logits, start=1):
        is_suspicious = policy.num_trailing_suspicious(done.trace) > 0
        if is_due(schedule, length, done.trace.position, is_suspicious=is_suspicious):
            done.trace.add(length, logit)
        done.decide(policy, length)
        if isinstance(done.last, Rollback):
            return done
    if done.trace.position < len(logits):
        done.trace.add(len(logits), logits[-1])
    done.decide(policy, len(logits), is_final=True)
    return done


schedules = st.one_of(st.just(Every()), st.builds(Periodic, st.integers(1, 12)), st.just(Annealed()), st.just(First()))
responses = st.lists(st.sampled_from([HIGH, LOW]) | st.floats(-6, 6) | st.just(math.nan), min_size=1, max_size=80)
policies = st.builds(
    block,
    patience=st.integers(1, 5),
    lookback=st.integers(0, 12),
    response_block=st.floats(0.5, 0.95),
    onset=st.floats(0.05, 0.5),
)
smoothings = st.floats(0.1, 1.0)


@given(policy=policies, schedule=schedules, logits=responses, smoothing=smoothings)
def test_no_token_that_a_later_decision_withdraws_was_ever_releasable(policy, schedule, logits, smoothing):
    done = walk(policy, schedule, logits, smoothing)
    if isinstance(done.last, Rollback):
        assert max(done.releasable, default=0) <= done.last.to


@given(policy=policies, schedule=schedules, logits=responses, smoothing=smoothings)
def test_releasable_never_decreases_and_never_exceeds_the_response(policy, schedule, logits, smoothing):
    done = walk(policy, schedule, logits, smoothing)
    assert done.releasable == sorted(done.releasable)
    assert all(d.releasable <= length for length, d in done.decisions if isinstance(d, Continue))


@given(policy=policies, period=st.integers(1, 12), logits=responses, smoothing=smoothings)
def test_holdback_lags_at_most_lookback_interval_and_patience_less_one(policy, period, logits, smoothing):
    done = walk(policy, Periodic(period), logits, smoothing)
    lags = [length - d.releasable for length, d in done.decisions if isinstance(d, Continue)]
    assert max(lags, default=0) <= policy.lookback + period + policy.patience - 1


def test_holdback_is_8_tokens_normally_and_11_under_suspicion():
    # Lookback 8, interval 1, patience 3. Before its assessment decides, the third token of a run has been
    # generated: 11 tokens are held. The decision after the second one has just been made with 10.
    done = walk(block(), Every(), [LOW] * 20 + [HIGH] * 2 + [LOW])
    lags = [length - d.releasable for length, d in done.decisions[:-1]]
    assert lags[19] == 8
    assert lags[20:22] == [9, 10]
    assert max(lags) + 1 == 11


@given(policy=policies, schedule=schedules, logits=responses, smoothing=smoothings)
def test_a_rollback_goes_at_most_lookback_before_the_last_clear_assessment(policy, schedule, logits, smoothing):
    done = walk(policy, schedule, logits, smoothing)
    if isinstance(done.last, Rollback):
        clear = [a.position for a in done.trace.assessments if not policy.is_suspicious(a)]
        last_clear = max(clear, default=0)
        assert max(0, last_clear - policy.lookback) <= done.last.to <= last_clear


@given(policy=policies, schedule=schedules, logits=responses, smoothing=smoothings)
def test_a_replayed_trace_gives_the_same_decisions(policy, schedule, logits, smoothing):
    done = walk(policy, schedule, logits, smoothing)
    replay = Trace(smoothing)
    for index, (length, decision) in enumerate(done.decisions):
        for assessment in done.trace.assessments[len(replay.assessments) : done.num_assessed[index]]:
            replay.add(assessment.position, logits[assessment.position - 1])
        assert policy.decide(replay, length, is_final=index == len(logits)) == decision
    assert str(replay) == str(done.trace)  # as text, because NaN does not equal itself


@given(policy=policies, schedule=schedules, logits=responses, smoothing=smoothings)
def test_score_and_off_always_continue_with_everything_releasable(policy, schedule, logits, smoothing):
    for mode in (Mode.SCORE, Mode.OFF):
        observing = Policy(mode, mode, policy.request_block, policy.response_block, policy.onset, policy.patience)
        done = walk(observing, schedule, logits, smoothing)
        assert done.decisions == [(length, Continue(length)) for length in (*range(1, len(logits) + 1), len(logits))]


def test_a_final_decision_without_an_assessment_of_the_end_is_refused():
    trace = Trace(1.0)
    trace.add(3, LOW)
    with pytest.raises(ValueError, match="needs an assessment at 5, the newest is at 3"):
        block().decide(trace, 5, is_final=True)


def test_patience_suspicious_assessments_in_a_row_roll_back():
    done = walk(block(patience=3), Every(), [LOW] * 4 + [HIGH] * 3)
    assert done.decisions[-2] == (6, Continue(0))
    assert done.decisions[-1] == (7, Rollback(to=4))


def test_a_clear_assessment_restarts_the_run():
    done = walk(block(patience=3), Every(), [HIGH, HIGH, LOW] * 4)
    assert all(isinstance(decision, Continue) for _, decision in done.decisions)


def test_at_the_end_one_suspicious_assessment_is_enough():
    done = walk(block(patience=3), Every(), [LOW] * 5 + [HIGH])
    assert done.last == Rollback(to=5)


def test_a_rollback_returns_to_where_the_raw_risk_rose_over_the_onset():
    # Raw risks 0.02, 0.02, 0.73, 0.73, then over the block threshold: the onset lies after token 2.
    done = walk(block(onset=0.5), Every(), [-4.0, -4.0, 1.0, 1.0, HIGH, HIGH, HIGH])
    assert done.last == Rollback(to=2)


def test_a_dip_below_the_onset_begins_a_new_rise():
    done = walk(block(onset=0.5), Every(), [1.0, 1.0, -4.0, 1.0, HIGH, HIGH, HIGH])
    assert done.last == Rollback(to=3)


def test_an_early_onset_is_cut_at_the_lookback():
    # The risk rose at token 1; the last clear assessment is at 20, so the target is 20 - 8.
    done = walk(block(onset=0.5), Every(), [1.0] * 20 + [HIGH] * 3)
    assert done.last == Rollback(to=12)


def test_a_response_suspicious_from_its_first_token_goes_back_to_its_beginning():
    assert walk(block(), Every(), [HIGH] * 3).last == Rollback(to=0)


def test_a_failed_head_rolls_back():
    # NaN counts as certain harm, so three in a row are an alarm.
    assert walk(block(), Every(), [LOW] * 4 + [math.nan] * 3).last == Rollback(to=4)


@pytest.mark.parametrize(
    ("mode", "risk", "expected"),
    [
        (Mode.BLOCK, 0.91, Refuse()),
        (Mode.BLOCK, 0.9, Continue(0)),  # over the threshold, not at it
        (Mode.BLOCK, None, Continue(0)),
        (Mode.SCORE, 0.99, Continue(0)),
        (Mode.OFF, 0.99, Continue(0)),
    ],
)
def test_only_a_blocking_input_side_refuses_and_only_over_the_threshold(mode, risk, expected):
    policy = Policy(input=mode, output=Mode.BLOCK, request_block=0.9, response_block=0.9, onset=0.5)
    assert policy.decide_request(risk) == expected


@pytest.mark.parametrize(
    ("mode", "risk", "expected"),
    [
        (Mode.BLOCK, 0.1, True),
        (Mode.BLOCK, 0.2, True),
        (Mode.BLOCK, 0.21, False),
        (Mode.BLOCK, None, False),
        (Mode.SCORE, 0.1, False),
        (Mode.OFF, None, False),
    ],
)
def test_a_refusal_is_redrawn_where_the_request_is_clear_and_its_side_acts(mode, risk, expected):
    assert replace(block(redraw_below=0.2), input=mode).redraws(risk) is expected
    assert not replace(block(), input=mode).redraws(risk)


def test_modes_are_ordered_by_strictness():
    assert Mode.OFF.strictness < Mode.SCORE.strictness < Mode.BLOCK.strictness


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"patience": 0}, "got 0 and 8"),
        ({"lookback": -1}, "got 3 and -1"),
        ({"onset": 0.95}, "onset 0.95 must not exceed"),
        ({"redraw_below": 0.95}, r"redraw_below 0.95 must be from 0 to request.block, 0\.9"),
        ({"redraw_below": -0.1}, r"redraw_below -0.1 must be from 0 to request.block, 0\.9"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(changes, named: str):
    with pytest.raises(ValueError, match=named):
        block(**changes)
