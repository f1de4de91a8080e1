import numpy as np
import pytest

from evaluation.intervals import bootstrap, mean, resampled, wilson


def test_wilson_by_hand():
    # p = 5/10, z = 1.96: centre 0.5, half width 1.96 * sqrt(0.025 + 0.0096) / 1.384 = 0.2634.
    share = wilson(5, 10)
    assert (share.value, share.n) == (0.5, 10)
    assert (share.low, share.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_none_of_many_is_not_zero_percent():
    # z^2 / (n + z^2) = 3.8415 / 376.84.
    assert wilson(0, 373).high == pytest.approx(0.0102, abs=1e-4)


def test_a_share_of_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        wilson(0, 0)


def test_a_mean_has_a_bootstrap_interval_that_repeats():
    # Of 0 to 99: standard deviation 28.87, so that of the mean of 100 is 2.887, and 1.96 of them are 5.66.
    values = [float(value) for value in range(100)]
    found = mean(values)
    assert (found.value, found.n) == (49.5, 100)
    assert (found.low, found.high) == pytest.approx((49.5 - 5.66, 49.5 + 5.66), abs=0.6)
    assert found == mean(values)
    assert found.high - found.value != found.value - found.low  # of the resamples, not of a normal distribution


def test_a_statistic_of_rows_is_resampled_row_by_row():
    found = resampled([(1, 2), (3, 4), (5, 2)], lambda some: some[..., 0].sum(axis=1) / some[..., 1].sum(axis=1))
    assert (found.value, found.n) == (9 / 8, 3)
    assert 0.5 <= found.low < found.value < found.high <= 2.5
    assert resampled([7, 7, 7], lambda some: np.median(some, axis=1)).high == 7.0


def test_a_mean_of_hits_and_misses_is_a_share():
    assert mean([0.0] * 373) == wilson(0, 373)
    assert mean([1.0, 0.0]) == wilson(1, 2)


def test_a_mean_of_too_few_samples_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        mean([])
    with pytest.raises(ValueError, match="one sample"):
        mean([0.5])


def test_the_bootstrap_encloses_its_estimate_and_repeats_with_the_seed():
    labels, scores = [0, 1] * 50, [float(i % 7) for i in range(100)]

    def mean_gap(y, s):
        return float(s[y == 1].mean() - s[y == 0].mean())

    first, again = (bootstrap(labels, scores, mean_gap, resamples=200) for _ in range(2))
    assert first == again
    assert first.low < first.value < first.high


def test_a_bootstrap_over_one_class_is_an_error():
    with pytest.raises(ValueError, match="both classes"):
        bootstrap([1, 1], [0.2, 0.3], lambda y, s: 0.0)
