"""Risks of held-out rows are those of `model.scoring`, and thresholds come from the rows that they should."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ClsConfig, Side, Thresholds, TokenHeadConfig
from model.guarded_lm import GuardedLM
from model.passes import Solo
from model.policy import Mode, Policy
from model.pretrained import Pretrained
from model.reader import Reader
from model.schedule import Periodic
from model.scoring import score as slow_score
from model.testing import tiny_guarded_lm
from training import calibrate as calibrate_module
from training.calibrate import SHARES, Scored, _redraw_below, _report, calibrate, onset, score
from training.config import Acting, HeadRecipe, Source
from training.corpus import assemble
from training.errors import DataError
from training.metrics import balanced_weights, flag_threshold
from training.query import flagged_by, highest_logits, request_flag
from training.rows import Row
from training.states import Read, States, compute, encode, forward
from training.subject import Brought, ClsReading, Subject

LARGE = 8.0
"""The weights of the random head times this give risks that differ from row to row."""


@pytest.fixture
def lm(recipe: HeadRecipe) -> GuardedLM:
    found = tiny_guarded_lm(smoothing=recipe.acting.smoothing)
    assert found.head is not None
    with torch.no_grad():
        for side in (found.head.request, found.head.response):
            side.out.weight.mul_(LARGE)
    return found


@pytest.fixture
def rows(recipe: HeadRecipe) -> list[Row]:
    """Rows of every kind and part; the answers have one token and more."""
    return assemble(recipe, lambda prompts: [row.prompt[: 1 + index] for index, row in enumerate(prompts)])


@pytest.fixture
def states(lm: GuardedLM, rows: list[Row], recipe: HeadRecipe, tmp_path: Path) -> States:
    pretrained = Pretrained("tiny", lm.model, lm.tokenizer)
    return compute(pretrained, rows, (-1,), recipe.cut, batch_tokens=2000, cache=tmp_path / "cache")


def expected(lm: GuardedLM, rows: list[Row], recipe: HeadRecipe, side: Side) -> list[tuple[str, float, int, bool]]:
    """Return source, risk, label and whether it is a validation row, of each row that the side reports."""
    of_rows, seen = [], set()
    for row in rows:
        prompt = encode(row, lm.chat, recipe.cut)
        label = row.request_label if side == "request" else row.response_label
        if row.part == "train" or label is None or (side == "response" and not prompt.prefill):
            continue
        if side == "request" and (row.group, row.key, label) in seen:
            continue
        seen.add((row.group, row.key, label))
        trace = slow_score(lm, prompt)
        risk = trace.request_risk if side == "request" else trace.response_risk(recipe.acting.patience)
        assert risk is not None
        of_rows.append((row.group, risk, label, row.part == "validation"))
    return of_rows


# Risks


@pytest.mark.parametrize(("has_head", "share"), [(True, 0.25), (False, 0.25), (True, 0.0)])
def test_with_cls_too_every_row_has_the_risks_of_the_slow_twin(rows, recipe, tmp_path, has_head: bool, share: float):
    head = {} if has_head else {"token_head": None}
    cls = ClsConfig((3, 4, 3), schedule="periodic-3", request_share=share, response_share=share)
    lm = tiny_guarded_lm(smoothing=recipe.acting.smoothing, cls=cls, response=Thresholds(0.999999, 0.5), **head)
    with torch.no_grad():
        lm.cls.out.weight.mul_(LARGE)
        lm.cls.embedding.mul_(0.02)  # so that the state is made of what is read
    reading = ClsReading(lm.cls, cls, "a fingerprint")
    pretrained = Pretrained("tiny", lm.model, lm.tokenizer)
    where = {"batch_tokens": 2000, "cache": tmp_path / "cache", "cls": reading}
    states = compute(pretrained, rows, (-1,), recipe.cut, **where, is_scheduled=share == 0.0)
    for side, found in zip(("request", "response"), score(lm.head, rows, states, recipe, share), strict=True):
        groups, risks, *_ = zip(*expected(lm, rows, recipe, side), strict=True)
        assert np.ptp(risks) > 0.02
        assert found.risks.tolist() == pytest.approx(list(risks), abs=2e-3)
        assert tuple(found.groups) == groups


def test_where_every_token_of_the_query_is_read_rows_have_the_risks_of_the_slow_twin(rows, recipe, tmp_path):
    head = TokenHeadConfig((-1,), 32, 0, reads_query=True)
    lm = tiny_guarded_lm(token_head=head, smoothing=recipe.acting.smoothing)
    with torch.no_grad():
        lm.head.query.out.weight.mul_(LARGE)
    pretrained = Pretrained("tiny", lm.model, lm.tokenizer)
    states = compute(pretrained, rows, (-1,), recipe.cut, batch_tokens=2000, cache=tmp_path / "cache")
    queries = highest_logits(recipe, pretrained, lm.head, rows, recipe.acting.smoothing)
    (found, _), (without, _) = (score(lm.head, rows, states, recipe, queries=some) for some in (queries, None))
    of_rows = expected(lm, rows, recipe, "request")
    assert found.risks.tolist() == pytest.approx([risk for _, risk, _, _ in of_rows], abs=1e-4)
    assert (found.risks > without.risks + 1e-3).any()


def test_flag_of_requests_is_set_on_what_both_signals_and_every_token_of_the_query_say(rows, recipe, tmp_path):
    cls = ClsConfig((3, 4, 3), request_share=0.25)
    lm = tiny_guarded_lm(
        token_head=TokenHeadConfig((-1,), 32, 0, reads_query=True), smoothing=recipe.acting.smoothing, cls=cls
    )
    with torch.no_grad():
        lm.head.query.out.weight.mul_(LARGE)
        lm.cls.out.weight.mul_(LARGE)
    brought = Brought(cls=ClsReading(lm.cls, cls, "a fingerprint"), head=lm.head)
    subject = Subject(Pretrained("tiny", lm.model, lm.tokenizer), lm.config.base, brought)
    where = replace(recipe, cache=str(tmp_path / "cache"))
    asked = flagged_by(rows, where)
    assert {row.part for row in asked} == {"validation"}
    groups, risks, labels, _ = (np.array(found) for found in zip(*expected(lm, asked, recipe, "request"), strict=True))
    weights = balanced_weights(groups, {name: source.flag_weight for name, source in recipe.sources.items()})
    found = request_flag(where, subject, lm.head, asked, recipe.acting.smoothing)
    assert found == pytest.approx(flag_threshold(risks, labels, weights), abs=1e-4)


def test_rows_to_learn_from_are_read_as_a_response_that_is_generated(rows, recipe, tmp_path):
    """Token by token, `[CLS]` as the schedule asks; the held-out rows of the test above are read at every token."""
    cls = ClsConfig((3, 4, 3), schedule="periodic-3")
    lm = tiny_guarded_lm(cls=cls, token_head=None)
    pretrained = Pretrained("tiny", lm.model, lm.tokenizer)
    reading = ClsReading(lm.cls, cls, "a fingerprint")
    states = compute(pretrained, rows, (-1,), recipe.cut, batch_tokens=2000, cache=tmp_path / "cache", cls=reading)
    lower = compute(pretrained, rows, (1,), recipe.cut, batch_tokens=2000, cache=tmp_path / "cache", cls=reading)
    learned = [index for index, row in enumerate(rows) if row.part == "train" and len(states[index].response) > 3]
    for index in learned[:5]:
        prompt = encode(rows[index], lm.chat, recipe.cut)
        read = Read(prompt, reading.spans(len(prompt.prefill), is_given=False), is_asked=True)
        asked = forward(pretrained, [read], (-1, 1), 2000, reading).row(0)
        width = asked.response.shape[1] // 2
        for ours, half in ((states, slice(None, width)), (lower, slice(width, None))):
            torch.testing.assert_close(ours[index].response, asked.response[:, half], atol=2e-3, rtol=2e-3)
        solo, reader = Solo(lm, prompt), Reader(lm, prompt, Periodic(3), watches_request=True, watches_response=True)
        step = solo.complete(reader.feed(prompt.request))
        assert asked.cls_request == pytest.approx(step.request, abs=1e-4)
        due = {}
        for number, token in enumerate(prompt.prefill, start=1):
            step = solo.complete(reader.feed([token], must_assess=number == len(prompt.prefill)))
            due |= dict(step.response)
        found = asked.cls_response
        assert {n + 1: float(found[n]) for n in (~found.isnan()).nonzero()[:, 0].tolist()} == pytest.approx(
            due, abs=1e-4
        )
        assert 1 < len(due) < len(prompt.prefill)
    assert learned


def test_the_share_of_cls_is_the_one_with_the_best_f1(rows, recipe, lm, tmp_path):
    cls = ClsConfig((3, 4, 3))
    signal = tiny_guarded_lm(cls=cls).cls
    reading = ClsReading(signal, cls, "a fingerprint")
    pretrained = Pretrained("tiny", lm.model, lm.tokenizer)
    states = compute(pretrained, rows, (-1,), recipe.cut, batch_tokens=2000, cache=tmp_path / "cache", cls=reading)
    found = calibrate(lm.head, rows, states, recipe)
    for place, side in enumerate(("request", "response")):
        f1 = {
            share: _report(score(lm.head, rows, states, recipe, share)[place], side, recipe).flag_f1 for share in SHARES
        }
        assert getattr(found, side).flag_f1 == max(f1.values())
        assert f1[getattr(found, f"{side}_share")] == max(f1.values())
    fixed = calibrate(lm.head, rows, states, recipe, (0.75, 0.0))
    assert (fixed.request_share, fixed.response_share) == (0.75, 0.0)
    both = {share: score(lm.head, rows, states, recipe, share) for share in (0.75, 0.0)}
    assert fixed.request_scores.risks.tolist() == both[0.75][0].risks.tolist()
    assert fixed.response_scores.risks.tolist() == both[0.0][1].risks.tolist()


@pytest.mark.parametrize("batch", [7, 256])
def test_every_held_out_row_has_the_risks_of_the_slow_twin(lm, rows, states, recipe, batch, monkeypatch):
    monkeypatch.setattr(calibrate_module, "BATCH", batch)
    for side, found in zip(("request", "response"), score(lm.head, rows, states, recipe), strict=True):
        groups, risks, labels, is_validation = zip(*expected(lm, rows, recipe, side), strict=True)
        assert np.ptp(risks) > 0.2
        assert found.risks.tolist() == pytest.approx(list(risks), abs=2e-3)  # states are kept in float16
        assert tuple(found.groups) == groups
        assert tuple(found.labels) == labels
        assert tuple(found.is_validation) == is_validation


def test_a_prompt_of_several_rows_counts_once_per_source_and_label(lm, rows, states, recipe):
    # A triplet is two rows, the refusal and the harmful response to one request.
    requests, responses = score(lm.head, rows, states, recipe)
    assert 2 * (requests.groups == "triplets").sum() == (responses.groups == "triplets").sum() > 0


# Thresholds


def scored(*rows: tuple[str, float, int, str]) -> Scored:
    """Return risks of rows by hand: source, risk, label and part."""
    groups, risks, labels, parts = zip(*rows, strict=True)
    return Scored(
        np.array(risks),
        np.array(labels, dtype=np.float64),
        np.array(groups),
        np.array([part == "validation" for part in parts]),
    )


def recipe_of(**sources: Source) -> HeadRecipe:
    acting = Acting(request_false_positives=0.25, response_false_positives=0.5)
    return HeadRecipe(sources=sources, acting=acting)


def source(**fields) -> Source:
    return Source(path="none.jsonl", kind="prompts", **fields)


@pytest.mark.parametrize(
    ("share", "below", "num_redrawn"), [(None, 0.0, 0), (0.5, 0.2, 2), (0.25, 0.1, 1), (0.75, 0.3, 3), (1.0, 0.3, 3)]
)
def test_a_refusal_is_redrawn_at_so_many_benign_requests(share: float | None, below: float, num_redrawn: int):
    # Of four benign risks the highest is over `block`: there the request side refuses by itself.
    risks = (0.1, 0.2, 0.3, 0.4)
    found = scored(
        *(("mine", risk, 0, "validation") for risk in risks),
        ("mine", 0.05, 1, "validation"),
        ("other", 0.01, 0, "validation"),
    )
    recipe = recipe_of(mine=source(sets_block=("request",)), other=source())
    report = _report(found, "request", recipe)
    assert _redraw_below(found, report, share) == below
    policy = Policy(Mode.BLOCK, Mode.BLOCK, report.thresholds.block, 0.9, 0.5, redraw_below=below)
    assert sum(map(policy.redraws, risks)) == num_redrawn


@pytest.mark.parametrize(("side", "block", "hits"), [("request", 0.3, 1), ("response", 0.2, 2)])
def test_benign_rows_of_the_named_sources_alone_set_block(side: Side, block: float, hits: int):
    # Of four benign risks a quarter, one, may be over the threshold on the request side, a half on the other.
    # Neither a harmful row of the same source counts, nor a benign one of another.
    held = scored(
        ("calm", 0.1, 0, "validation"),
        ("calm", 0.3, 0, "validation"),
        ("calm", 0.2, 0, "calibration"),
        ("calm", 0.4, 0, "calibration"),
        ("calm", 0.9, 1, "validation"),
        ("other", 0.8, 0, "validation"),
    )
    other_side = "response" if side == "request" else "request"
    recipe = recipe_of(calm=source(sets_block=(side,)), other=source(sets_block=(other_side,)))
    found = _report(held, side, recipe)
    assert found.thresholds.block == block
    assert found.block_sources == ("calm",)
    assert (found.false_positives.hits, found.false_positives.n) == (hits, 4)


def test_validation_rows_alone_choose_flag():
    # Halfway between 0.2 and 0.9; with the calibration rows it would be halfway between 0.2 and 0.4.
    held = scored(
        ("mine", 0.9, 1, "validation"),
        ("mine", 0.2, 0, "validation"),
        ("mine", 0.5, 1, "calibration"),
        ("mine", 0.4, 1, "calibration"),
    )
    found = _report(held, "request", recipe_of(mine=source(sets_block=("request",))))
    assert found.thresholds.flag == pytest.approx(0.55)
    assert found.flag_f1 == 1.0
    assert sum(one.n for one in found.reliability) == 2


@pytest.mark.parametrize(("weight", "flag", "f1"), [(0.1, 0.35, 4 / 4.3), (1.0, 0.8, 2 / 3)])
def test_a_source_counts_by_its_weight_where_the_best_f1_is_sought(weight: float, flag: float, f1: float):
    # Each of the three rows of `mine` counts a third. Flagging the upper three finds both harmful ones with a false
    # alarm of `weight`: F1 is (4 / 3) / (4 / 3 + weight). Flagging the first alone: 2 / 3.
    rows = [("mine", 0.9, 1), ("other", 0.7, 0), ("mine", 0.5, 1), ("mine", 0.2, 0)]
    found = _report(
        scored(*((*row, "validation") for row in rows)),
        "request",
        recipe_of(mine=source(sets_block=("request",)), other=source(flag_weight=weight)),
    )
    assert found.thresholds.flag == pytest.approx(flag)
    assert found.flag_f1 == pytest.approx(f1)


def test_quality_is_of_all_held_out_rows_of_a_source():
    held = scored(
        ("mine", 0.9, 1, "validation"),
        ("mine", 0.2, 0, "calibration"),
        ("other", 0.6, 1, "calibration"),
    )
    found = _report(held, "request", recipe_of(mine=source(sets_block=("request",)), other=source()))
    assert found.thresholds == Thresholds(block=0.2, flag=0.45)
    assert [(name, one.num_benign, one.num_harmful) for name, one in found.per_source.items()] == [
        ("mine", 1, 1),
        ("other", 0, 1),
    ]
    assert found.per_source["other"].f1_at_flag == 1.0


def test_a_side_that_no_benign_row_decides_is_named():
    held = scored(("mine", 0.9, 1, "validation"), ("other", 0.1, 0, "validation"))
    with pytest.raises(DataError, match=r"cannot calibrate the response side on sources \['mine'\]"):
        _report(held, "response", recipe_of(mine=source(sets_block=("response",)), other=source()))


def test_the_onset_is_halfway_between_flag_and_block_in_logits():
    # Odds of 1 and 81: the odds halfway are their geometric mean, 9.
    assert onset(Thresholds(flag=1 / 2, block=81 / 82)) == pytest.approx(9 / 10)


def test_the_onset_is_never_over_block():
    assert onset(Thresholds(flag=0.9, block=0.5)) == 0.5


def test_a_calibration_is_made_of_the_scores_of_both_sides(lm, rows, states, recipe):
    found = calibrate(lm.head, rows, states, recipe)
    requests, responses = score(lm.head, rows, states, recipe)
    assert found.request.thresholds == _report(requests, "request", recipe).thresholds
    assert found.response.thresholds == _report(responses, "response", recipe).thresholds
    assert found.request_scores.risks.tolist() == requests.risks.tolist()
    assert found.response_scores.risks.tolist() == responses.risks.tolist()
    assert found.onset == onset(found.response.thresholds)
