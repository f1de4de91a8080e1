"""Risks inside a response equal those of the response cut there."""

import pytest

from evaluation.early import early_risks
from model.trace import Trace, response_risk


def test_a_lone_peak_counts_only_at_the_end():
    # The lowest of three in a row is 0.1 throughout; what stands last counts alone.
    assert response_risk([0.1, 0.1, 0.9, 0.1, 0.1], 3) == 0.1
    assert response_risk([0.1, 0.1, 0.9], 3) == 0.9


def test_three_in_a_row_count_by_their_lowest():
    assert response_risk([0.1, 0.8, 0.7, 0.9, 0.1], 3) == 0.7


def test_a_share_is_rounded_up_to_whole_tokens():
    # Of five tokens the first 2, 3 and 4, each with its last token alone.
    assert early_risks([0.1, 0.2, 0.3, 0.4, 0.5], 3) == (0.2, 0.3, 0.4)
    assert early_risks([0.6], 3) == (0.6, 0.6, 0.6)


@pytest.mark.parametrize("patience", [1, 2, 3, 9])
def test_the_risk_inside_a_text_is_that_of_the_text_cut_there(patience: int):
    logits = [-2.0, 3.0, 1.0, 2.5, -1.0, 0.5, 4.0, -3.0]
    whole = Trace(0.4)
    for position, logit in enumerate(logits, start=1):
        whole.add(position, logit)
    found = early_risks([assessment.smoothed for assessment in whole.assessments], patience)
    for share, risk in zip((2, 4, 6), found, strict=True):
        cut = Trace(0.4)
        for position, logit in enumerate(logits[:share], start=1):
            cut.add(position, logit)
        assert risk == cut.response_risk(patience)


@pytest.mark.parametrize(("smoothed", "patience"), [([], 3), ([0.1], 0)])
def test_no_tokens_and_no_patience_are_errors(smoothed: list[float], patience: int):
    with pytest.raises(ValueError, match="at least 1"):
        response_risk(smoothed, patience)
