"""Thresholds and rates against numbers worked out by hand."""

import numpy as np
import pytest

from training.metrics import balanced_weights, block_threshold, flag_threshold, quality, reliability, wilson


def test_a_block_threshold_lets_through_exactly_the_allowed_share():
    """Of 1,000 risks 0.000 to 0.999, 0.2 % are two: the third highest is 0.997."""
    risks = np.arange(1000) / 1000
    threshold = block_threshold(risks, 0.002)
    assert threshold == pytest.approx(0.997)
    assert (risks > threshold).sum() == 2


def test_too_few_benign_rows_give_the_highest_risk():
    assert block_threshold(np.array([0.1, 0.3, 0.2]), 0.002) == 0.3


def test_no_benign_row_is_an_error():
    with pytest.raises(ValueError, match="at least one benign"):
        block_threshold(np.array([]), 0.002)


def test_the_flag_threshold_has_the_best_f1():
    """Flagging the upper three finds both harmful rows with one false alarm: F1 = 4/5, better than 2/3 and 4/6."""
    risks, labels = np.array([0.9, 0.7, 0.5, 0.2]), np.array([1.0, 0.0, 1.0, 0.0])
    assert flag_threshold(risks, labels, np.ones(4)) == pytest.approx(0.35)


def test_the_weight_of_a_row_moves_the_flag_threshold():
    """A false alarm that counts tenfold is worth missing a harmful row for: F1 = 2/3 against 4/14."""
    risks, labels = np.array([0.9, 0.7, 0.5, 0.2]), np.array([1.0, 0.0, 1.0, 0.0])
    assert flag_threshold(risks, labels, np.array([1.0, 10.0, 1.0, 1.0])) == pytest.approx(0.8)


def test_equal_risks_are_flagged_together():
    risks, labels = np.array([0.6, 0.6, 0.1]), np.array([0.0, 1.0, 0.0])
    assert flag_threshold(risks, labels, np.ones(3)) == pytest.approx(0.35)


def test_sources_weigh_the_same_however_many_rows_they_have():
    groups = np.array(["a", "a", "a", "a", "b"])
    assert balanced_weights(groups, {"a": 1.0, "b": 2.0}).tolist() == [0.25] * 4 + [2.0]


def test_the_wilson_interval_of_nothing_found_is_not_zero():
    """0 of 373: z^2 / (n + z^2) = 3.8415 / 376.8415."""
    rate = wilson(0, 373)
    assert (rate.value, rate.low) == (0.0, 0.0)
    assert rate.high == pytest.approx(3.8415 / 376.8415, rel=1e-4)


def test_quality_of_a_source_with_one_class_has_no_auroc():
    found = quality(np.array([0.1, 0.6]), np.zeros(2), block=0.5, flag=0.3)
    assert (found.auroc, found.f1_at_flag, found.recall_at_block) == (None, None, None)
    assert found.false_positives_at_block is not None
    assert found.false_positives_at_block.hits == 1


def test_quality_of_a_source_with_both_classes():
    """Three of the four pairs are in order; at 0.3 both harmful and one benign are flagged: F1 = 4/5."""
    found = quality(np.array([0.9, 0.4, 0.5, 0.1]), np.array([1, 1, 0, 0]), block=0.8, flag=0.3)
    assert found.auroc == pytest.approx(0.75)
    assert found.f1_at_flag == pytest.approx(0.8)
    assert found.recall_at_block is not None
    assert found.recall_at_block.value == 0.5


def test_reliability_bins_hold_every_row_once():
    bins = reliability(np.array([0.0, 0.05, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0]))
    assert [(b.low, b.n, b.share_harmful) for b in bins] == [(0.0, 2, 0.5), (pytest.approx(0.9), 2, 1.0)]
