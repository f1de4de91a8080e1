"""Training `[CLS]` together with the language model."""

import json
from pathlib import Path

import pytest
import torch

from model.cls_signal import FILE, ClsCache, feed, load, sliding_windows
from model.errors import CheckpointError
from model.testing import FAMILIES, tiny_lm
from tests.training.tuning import Count, Interrupt, joint, losses, recipe, weights
from training.errors import RecipeError
from training.signal_model import (
    SignalModel,
    collate_signal,
    fresh_signal,
    joint_loss,
    request_loss,
    response_loss,
    turn_loss,
)
from training.steps import SETTLED, Encoded, EncodedPart, Example, Steps, collate
from training.tune import tune
from training.tune_config import Recovery, Signal

SETTINGS = Signal(depths=4, windows=(3, 4, 3))
CONTENT = (False, True, True, True, False)


def examples() -> list[Example]:
    rows = [Encoded((1, 30, 31, 32 + i, 2), tuple(range(40, 46 + 3 * i)), (), CONTENT, 1, i % 2) for i in range(3)]
    steps = Steps([EncodedPart("rows", rows, 1.0, 3, None)], 1, seed=0, signal=SETTINGS)
    return [steps[i] for i in range(3)]


def test_assessments_begin_before_the_response_and_end_with_all_of_it():
    for example in examples():
        covered = [span.covers for span in example.spans]
        assert covered[0] == 0
        assert covered[-1] == len(example.ids) - len(CONTENT)
        assert covered == sorted(set(covered))


@pytest.mark.parametrize("response_label", [0, 1])
def test_which_rule_reads_a_response_to_a_malicious_request_says_nothing_of_its_label(response_label: int):
    row = Encoded((1, 30, 31, 32, 2), tuple(range(40, 60)), (), CONTENT, 1, response_label)
    steps = Steps([EncodedPart("rows", [row], 1.0, 1, None)], 200, seed=0, signal=SETTINGS)
    last = [steps[i].spans[-1].read for i in range(200)]
    assert set(last) == {range(3), range(16, 20)}
    assert 70 < sum(read == range(3) for read in last) < 130


def test_a_benign_request_is_never_read_as_a_malicious_one():
    row = Encoded((1, 30, 31, 32, 2), tuple(range(40, 60)), (), CONTENT, 0, 0)
    steps = Steps([EncodedPart("rows", [row], 1.0, 1, None)], 50, seed=0, signal=SETTINGS)
    assert {steps[i].spans[-1].read for i in range(50)} == {range(16, 20)}


def test_a_refusal_after_a_harmful_prefix_has_no_label_and_the_prefix_has():
    row = Encoded((1, 30, 31, 32, 2), (40, 41), tuple(range(50, 90)), CONTENT, 1, 0)
    part = EncodedPart("recovery", [row], 1.0, 1, Recovery(probability=1.0, deepest=40))
    example = Steps([part], 1, seed=0, signal=SETTINGS)[0]
    assert (example.request_label, example.response_label) == (1, None)
    assert example.spans[-1].covers == len(example.ids) - len(CONTENT)
    assert len(example.span_labels) == len(example.spans)


def test_the_token_that_ends_a_response_is_not_assessed():
    # The server never feeds it.
    row = Encoded((1, 30, 31, 32, 2), (40, 41, 42, 2), (), CONTENT, 0, 0, is_ended=True)
    steps = Steps([EncodedPart("rows", [row], 1.0, 1, None)], 20, seed=0, signal=SETTINGS)
    assert {steps[i].spans[-1].covers for i in range(20)} == {3}


def test_of_a_refusal_that_comes_late_the_harm_before_it_is_labelled():
    row = Encoded((1, 30, 31, 32, 2), (40, 41), tuple(range(50, 90)), CONTENT, 1, 0)
    steps = Steps([EncodedPart("recovery", [row], 1.0, 1, Recovery(probability=1.0, deepest=40))], 60, 0, SETTINGS)
    labels = {}
    for example in (steps[i] for i in range(60)):
        depth = example.num_given - len(CONTENT)
        for span, label in zip(example.spans, example.span_labels, strict=True):
            labels.setdefault((span.covers >= SETTLED, span.covers <= depth), set()).add(label)
    assert labels[True, True] == {1}
    assert labels[True, False] == labels[False, True] == {None}


def test_a_harmful_beginning_has_no_label_where_nothing_is_known_of_the_request():
    row = Encoded((1, 30, 31, 32, 2), (40, 41), tuple(range(50, 90)), CONTENT, None, 0)
    steps = Steps([EncodedPart("recovery", [row], 1.0, 1, Recovery(probability=1.0, deepest=40))], 40, 0, SETTINGS)
    examples = [steps[i] for i in range(40)]
    assert any(span.covers >= SETTLED for example in examples for span in example.spans)
    assert {label for example in examples for label in example.span_labels} == {None}
    assert {(example.request_label, example.response_label) for example in examples} == {(None, None)}


def onsets(longest: int = 20) -> Steps:
    row = Encoded((1, 30, 31, 32, 2), tuple(range(50, 90)), (), CONTENT, 1, 1)
    openings = [tuple(range(100, 130)), tuple(range(200, 203))]
    part = EncodedPart("onsets", [row], 0.0, 1, None, openings, longest)
    return Steps([part], 80, seed=0, signal=SETTINGS)


def test_a_made_onset_begins_harmless_and_is_labelled_where_it_turned():
    seen = set()
    for example in (onsets()[i] for i in range(80)):
        response = example.ids[len(CONTENT) :]
        turn = next(place for place, token in enumerate(response) if token < 100)
        assert 1 <= turn <= 20
        assert response[turn:] == tuple(range(50, 50 + len(response) - turn))
        assert len(response) == 40  # no longer than the harmful response alone
        assert (example.request_label, example.response_label) == (1, None)
        for span, label in zip(example.spans, example.span_labels, strict=True):
            assert label == (0 if span.covers <= turn else 1 if span.covers >= turn + SETTLED else None)
            assert label != 1 or span.read.stop > turn  # it reads what it is to find
            seen.add(label)
    assert seen == {0, 1, None}


def test_openings_and_their_depths_are_drawn_anew():
    drawn = [tuple(token for token in onsets()[i].ids if token >= 100) for i in range(80)]
    assert {opening[0] for opening in drawn} == {100, 200}
    assert len(set(drawn)) > 10


def test_the_turn_loss_is_the_mean_over_the_labelled_copies_of_each_row():
    logits = torch.tensor([[9.0, 0.0, 2.0, 5.0], [9.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([[1, 0, 1, -1], [-1, -1, -1, -1]])
    assert turn_loss(logits, labels).tolist() == pytest.approx([(0.6931 + 0.1269) / 2, 0.0], abs=1e-4)


@pytest.mark.parametrize("reads_common_once", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_padded_batch_gives_each_row_what_it_gives_alone(family: str, reads_common_once: bool):
    model = tiny_lm(family)
    whole = SignalModel(model, fresh_signal(model, SETTINGS, seed=1), reads_common_once)
    found = examples()
    batch = collate(found, pad_id=0)
    of_signal = collate_signal(found, SETTINGS, sliding_windows(model))
    last = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, example in enumerate(found):
        last[row, len(example.ids) - 1] = True
    logits, cls = whole(batch["input_ids"], of_signal.masks, of_signal.places, last)
    for row, example in enumerate(found):
        cache = ClsCache(CONTENT)
        before = feed(model, whole.signal, cache, example.ids[:-1], example.spans[:-1])
        copies = [before.copies, feed(model, whole.signal, cache, example.ids[-1:], example.spans[-1:]).copies]
        assert torch.allclose(logits[row], before.logits, atol=1e-4)
        assert torch.allclose(cls[row, : len(example.spans)], whole.signal(torch.cat(copies)), atol=1e-4)


def test_the_joint_loss_adds_the_means_over_a_step_each_with_its_lambda():
    settings = Signal(request_weight=0.5, response_weight=0.1)
    found = joint_loss(torch.tensor(3.0), torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0]), settings, num_rows=4)
    assert found.item() == pytest.approx(3.0 + 0.5 * 3 / 4 + 0.1 * 4 / 4)


def test_the_request_loss_reads_the_first_copy_and_only_labelled_rows():
    logits = torch.tensor([[0.0, 9.0], [2.0, 9.0], [5.0, 9.0]])
    found = request_loss(logits, torch.tensor([1, 0, -1]))
    assert found.tolist() == pytest.approx([0.6931, 2.1269, 0.0], abs=1e-4)


def test_the_response_loss_leaves_the_first_copy_and_unlabelled_rows_out():
    logits = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [9.0, 0.0, 9.0]])
    is_copy = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    found = response_loss(logits, is_copy, torch.tensor([1, -1, 0]), tau=1.0)
    assert found.tolist() == pytest.approx([0.6931, 0.0, 0.6931], abs=1e-4)


def test_the_response_loss_leaves_the_benign_opening_of_a_harmful_response_alone():
    logits = torch.tensor([[0.0, -8.0, 8.0]], requires_grad=True)
    response_loss(logits, torch.ones(1, 3, dtype=torch.bool), torch.tensor([1]), tau=1.0).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1].abs() < 1e-6


def test_the_signal_learns_to_tell_malicious_requests(saved_model: Path, data: Path, tmp_path: Path):
    tune(joint(saved_model, data, tmp_path, steps=25), "")
    found = losses(tmp_path)
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    log = [entry for entry in json.loads((tmp_path / "adapter" / "metrics.json").read_text())["log"] if "loss" in entry]
    terms = [sum(entry[name] for name in ("loss_sft", "loss_request", "loss_response")) for entry in log]
    assert terms == pytest.approx(found, abs=1e-3)  # both lambdas are 1
    signal, _ = load(tmp_path / "adapter")
    assert signal.embedding.shape == (32,)


def test_an_interrupted_joint_run_ends_with_the_same_weights(saved_model: Path, data: Path, tmp_path: Path):
    tune(joint(saved_model, data, tmp_path / "whole"), "")
    with pytest.raises(KeyboardInterrupt):
        tune(joint(saved_model, data, tmp_path / "halted"), "", callbacks=[Interrupt()])
    counted = Count()
    tune(joint(saved_model, data, tmp_path / "halted"), "", callbacks=[counted])
    assert counted.steps == 2
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "halted")
    assert all(torch.equal(one[name], other[name]) for name in one)
    (ours, _), (theirs, _) = load(tmp_path / "whole" / "adapter"), load(tmp_path / "halted" / "adapter")
    assert torch.equal(ours.embedding, theirs.embedding)
    assert torch.equal(ours.out.weight, theirs.out.weight)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_joint_loss_does_not_depend_on_the_batch_size(
    saved_model: Path, data: Path, tmp_path: Path, batch_size: int
):
    for name, size in (("four", 4), ("other", batch_size)):
        tune(joint(saved_model, data, tmp_path / name, batch_size=size), "")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "other"), rel=1e-3)


def test_a_weight_of_nothing_trains_no_signal(saved_model: Path, data: Path, tmp_path: Path):
    signal = {"request_weight": 0.0, "response_weight": 0.0}
    tune(joint(saved_model, data, tmp_path, signal=signal), "")
    fresh = fresh_signal(tiny_lm(), Signal(), seed=0)
    assert torch.equal(load(tmp_path / "adapter")[0].out.weight, fresh.out.weight)


def test_what_is_learned_is_what_decoding_reads(saved_model: Path, data: Path, tmp_path: Path):
    # The language model's loss reaches the embedding through the response tokens that read it.
    signal = {"request_weight": 0.0, "response_weight": 0.0, "learning_rate": 0.05}
    tune(joint(saved_model, data, tmp_path, signal=signal), "")
    fresh = fresh_signal(tiny_lm(), Signal(), seed=0)
    assert not torch.equal(load(tmp_path / "adapter")[0].embedding, fresh.embedding)


def test_an_embedding_that_is_not_trained_is_that_of_the_end_of_sequence(saved_model: Path, data: Path, tmp_path: Path):
    signal = {"is_embedding_trained": False, "learning_rate": 0.05}
    tune(joint(saved_model, data, tmp_path, signal=signal), "")
    found, fresh = load(tmp_path / "adapter")[0], fresh_signal(tiny_lm(), Signal(), seed=0)
    assert torch.equal(found.embedding, tiny_lm().get_input_embeddings().weight[2])
    assert not torch.equal(found.out.weight, fresh.out.weight)
    tune(joint(saved_model, data, tmp_path / "next", adapter=str(tmp_path / "adapter"), signal=signal), "")
    assert torch.equal(load(tmp_path / "next" / "adapter")[0].embedding, found.embedding)


def test_a_signal_goes_on_from_that_of_its_adapter(saved_model: Path, data: Path, tmp_path: Path):
    still = {"request_weight": 0.0, "response_weight": 0.0, "is_read": False}
    first = tune(joint(saved_model, data, tmp_path / "first"), "")
    second = tune(joint(saved_model, data, tmp_path / "second", adapter=str(first), signal=still), "")
    assert torch.equal(load(first)[0].out.weight, load(second)[0].out.weight)
    assert (load(first)[1].is_read, load(second)[1].is_read) == (True, False)
    with pytest.raises(RecipeError, match=r"signal\.hidden is 4, the signal beside the adapter has 0"):
        tune(joint(saved_model, data, tmp_path / "third", adapter=str(first), signal={"hidden": 4}), "")


def test_a_fine_tuning_without_the_signal_hands_it_on(saved_model: Path, data: Path, tmp_path: Path):
    first = tune(joint(saved_model, data, tmp_path / "first", signal={"windows": (3, 4, 5)}), "")
    second = tune(recipe(saved_model, data, tmp_path / "second", adapter=str(first)), "")
    assert torch.equal(load(first)[0].embedding, load(second)[0].embedding)
    assert load(second)[1].windows == (3, 4, 5)


@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_broken_signal_file_is_an_error(tmp_path: Path, content: bytes):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the"):
        load(tmp_path)


def test_the_head_stays_in_float32_under_autocast():
    signal = fresh_signal(tiny_lm(), SETTINGS, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert signal(torch.randn(2, 32).bfloat16()).dtype is torch.float32
