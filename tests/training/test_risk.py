"""The vectorised risks are those of `model.trace`, which the policy reads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.trace import Trace, probability
from training.risk import request_risks, response_risks, smooth

logit = st.floats(-30, 30) | st.just(math.nan)


@settings(deadline=None)  # the first call of a kernel is slow
@given(
    responses=st.lists(st.lists(logit, min_size=1, max_size=12), min_size=1, max_size=4),
    smoothing=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
    patience=st.integers(1, 5),
)
def test_response_risks_equal_those_of_the_trace(responses: list[list[float]], smoothing: float, patience: int):
    longest = max(map(len, responses))
    padded = torch.tensor([response + [30.0] * (longest - len(response)) for response in responses], dtype=torch.double)
    found = response_risks(padded, torch.tensor([len(r) for r in responses]), smoothing, patience)
    for response, risk in zip(responses, found.tolist(), strict=True):
        trace = Trace(smoothing)
        for position, value in enumerate(response, start=1):
            trace.add(position, value)
        assert risk == pytest.approx(trace.response_risk(patience), rel=1e-9)


def test_request_risks_equal_the_probability_of_the_trace():
    values = [-40.0, -1.5, 0.0, 3.0, 40.0, math.nan]
    assert request_risks(torch.tensor(values)).tolist() == pytest.approx([probability(value) for value in values])


def test_smoothing_starts_at_the_first_logit_and_moves_by_its_weight():
    """Weight 1/4: 4, then 3/4 * 4 + 1/4 * 0 = 3, then 3/4 * 3 + 1/4 * 8 = 4.25."""
    assert smooth(torch.tensor([[4.0, 0.0, 8.0]]), 0.25)[0].tolist() == pytest.approx([4.0, 3.0, 4.25])
