"""Cached states are those of a plain forward pass, and an interruption costs one file at most."""

from dataclasses import replace
from math import exp, isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from model.chat import ChatTemplate, EncodedPrompt, Message
from model.config import ClsConfig, TokenHeadConfig
from model.pretrained import Pretrained
from model.safety_head import TokenHead
from model.scoring import score
from model.testing import FAMILIES, byte_tokenizer, tiny_guarded_lm, tiny_lm
from training import states as states_module
from training.config import Cut, HeadRecipe
from training.corpus import assemble
from training.errors import RecipeError
from training.head import collate_requests, collate_responses, standardise
from training.rows import Row
from training.states import RowStates, Shard, States, compute, encode
from training.subject import ClsReading

CUT = Cut(request_tokens=96, response_tokens=20)


def sigmoid(logit: float) -> float:
    return 1 / (1 + exp(-logit))


@pytest.fixture
def rows(recipe: HeadRecipe) -> list[Row]:
    found = assemble(recipe, lambda prompts: [f"An answer to: {row.prompt}" for row in prompts])
    return found[::6]


@pytest.mark.parametrize("layers", [(1, -1), (0, 1)], ids=["all layers", "lower layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_equal_a_plain_forward_pass(family: str, layers: tuple[int, int], rows: list[Row], tmp_path: Path):
    pretrained = Pretrained("tiny", tiny_lm(family), byte_tokenizer())
    template = ChatTemplate(pretrained.tokenizer)
    found = compute(pretrained, rows, layers, CUT, batch_tokens=500, cache=tmp_path / family)
    for index, row in enumerate(rows):
        prompt = encode(row, template, CUT)
        ids = torch.tensor([(*prompt.request, *prompt.prefill)])
        with torch.inference_mode():
            hidden = pretrained.model(ids, output_hidden_states=True).hidden_states
        plain = torch.cat([hidden[layer][0] for layer in layers], dim=-1)  # (T, S), where S is 2 * D
        border = len(prompt.request)
        assert 0 < prompt.query_start < border
        request = torch.cat([plain[border - 1], plain[prompt.query_start : border].mean(dim=0)])
        torch.testing.assert_close(found[index].request.float(), request, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found[index].response.float(), plain[border:], atol=2e-3, rtol=2e-3)


def test_layers_above_those_that_are_read_are_not_run(tiny: Pretrained, rows: list[Row], tmp_path: Path):
    ran: list[int] = []
    for number, layer in enumerate(tiny.model.base_model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    compute(tiny, rows, (1,), CUT, batch_tokens=500, cache=tmp_path)
    assert set(ran) == {0, 1}  # one more than is read: the last state is normalised
    compute(tiny, rows, (0, -1), CUT, batch_tokens=500, cache=tmp_path)
    assert set(ran) == {0, 1, 2}


@pytest.mark.parametrize("part", ["train", "calibration"])
def test_what_cls_finds_is_kept_of_held_out_rows_alone(rows: list[Row], part: str, tmp_path: Path):
    lm = tiny_guarded_lm(token_head=None, cls=ClsConfig(windows=(3, 4, 3), schedule="every"))
    assert lm.cls is not None
    pretrained, reading = Pretrained("tiny", lm.model, lm.tokenizer), ClsReading(lm.cls, lm.cls_config, "")
    answered = [replace(row, part=part) for row in rows if row.response]
    found = compute(pretrained, answered, (1,), CUT, batch_tokens=500, cache=tmp_path, cls=reading)
    is_kept = part != "train"
    for index, row in enumerate(answered):
        prompt = encode(row, lm.chat, CUT)
        trace = score(lm, prompt)
        logits = found[index].cls_response
        assert len(logits) == len(prompt.prefill) == len(trace.assessments)
        assert logits.isfinite().all() if is_kept else logits.isnan().all()
        assert isfinite(found[index].cls_request) == is_kept
        if is_kept:
            assert sigmoid(found[index].cls_request) == pytest.approx(trace.request_risk, abs=1e-4)
            raw = [assessment.risk for assessment in trace.assessments]
            assert torch.sigmoid(logits).tolist() == pytest.approx(raw, abs=1e-4)


def test_what_is_kept_of_a_row_by_hand():
    # Three tokens before the query, three of it with the mean (3 + 5 + 10) / 3, two of the response, and padding.
    states = torch.tensor([[90.0], [91.0], [92.0], [3.0], [5.0], [10.0], [7.0], [8.0], [50.0]])
    found = states_module._row_states(states, EncodedPrompt((1,) * 6, (1,) * 2, 3))
    assert found.request.tolist() == [10, 6]
    assert found.response.tolist() == [[7], [8]]
    assert found.request.dtype == found.response.dtype == torch.float16


def test_a_state_beyond_float16_is_kept_as_its_largest_value():
    found = states_module._row_states(torch.tensor([[1e6], [1e6], [-1e6]]), EncodedPrompt((1,) * 2, (1,)))
    assert found.request.tolist() == [65504, 65504]
    assert found.response.tolist() == [[-65504]]


def test_the_response_is_a_passage_of_its_own():
    # Means: 2; (2 + 4) / 2. Kept in float16, and joined in float32: 2049 has 12 bits.
    features = RowStates(torch.zeros(2), torch.tensor([[2.0], [4.0]]).half()).passage()
    assert features.dtype == torch.float32
    assert features.tolist() == [[2, 2], [4, 3]]
    large = RowStates(torch.zeros(2), torch.tensor([[2048.0], [2050.0]]).half()).passage()
    assert large[1].tolist() == [2050, 2049]


def test_a_row_without_a_response_has_an_empty_passage():
    assert RowStates(torch.zeros(4).half(), torch.zeros(0, 2).half()).passage().shape == (0, 4)


def test_a_batch_holds_the_passages_of_its_rows_one_after_the_other(rows: list[Row]):
    items = [
        RowStates(torch.tensor([1.0, 2.0]).half(), torch.tensor([[2.0], [4.0]]).half()),
        RowStates(torch.tensor([3.0, 4.0]).half(), torch.tensor([[6.0]]).half()),
    ]
    batch = list(zip(items, [replace(rows[0], opening_tokens=1), rows[1]], strict=True))
    responses = collate_responses(batch)
    assert responses["features"].tolist() == [[2, 2], [4, 3], [6, 6]]
    assert responses["mask"].tolist() == [[True, True], [True, False]]
    assert responses["counted"].tolist() == [[False, True], [True, False]]
    assert collate_requests(batch)["features"].tolist() == [[1, 2], [3, 4]]


def test_features_are_standardised_by_those_of_the_training_rows(rows: list[Row]):
    # Requests: means of 1 and 3, of 2 and 6. Passages: (2, 2), (4, 3), (6, 6); the mean of their states is 4,
    # that of their means 11 / 3. The last row is held out.
    kept = Shard(
        request=torch.tensor([[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]]).half(),
        response=torch.tensor([[2.0], [4.0], [6.0], [99.0]]).half(),
        ends=torch.tensor([2, 3, 4]),
    )
    head = TokenHead(TokenHeadConfig((-1,), 1, 0))
    parts = ("train", "train", "validation")
    standardise(
        head,
        [replace(row, part=part) for row, part in zip(rows, parts, strict=False)],
        States((kept,), ((0, 0), (0, 1), (0, 2))),
    )
    assert head.request.mean.tolist() == [2, 4]
    assert head.request.std.tolist() == [1, 2]
    assert head.response.mean.tolist() == pytest.approx([4, 11 / 3])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_trained_on_is_what_is_read_in_scoring(
    family: str, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lm = tiny_guarded_lm(family)
    read: dict[str, list[torch.Tensor]] = {"request": [], "response": []}
    assess = lm.assess
    monkeypatch.setattr(lm, "assess", lambda side, features: read[side].append(features) or assess(side, features))
    labelled = [row for row in rows if row.response is not None][:6]
    pretrained = Pretrained("tiny", lm.model, lm.tokenizer)
    found = compute(pretrained, labelled, (-1,), Cut(256, 256), batch_tokens=900, cache=tmp_path / "cache")
    for row in labelled:
        score(lm, encode(row, lm.chat, Cut(256, 256)))
    trained = [found[index] for index in range(len(labelled))]
    for side, features in (
        ("request", torch.stack([states.request for states in trained]).float()),
        ("response", torch.cat([states.passage() for states in trained])),
    ):
        torch.testing.assert_close(features, torch.cat(read[side]), atol=2e-3, rtol=2e-3)


def test_a_request_is_cut_on_the_left_and_a_response_on_the_right(tiny: Pretrained, rows: list[Row]):
    row = next(row for row in rows if row.response is not None)
    template = ChatTemplate(tiny.tokenizer)
    whole, cut = encode(row, template, Cut(512, 512)), encode(row, template, Cut(10, 4))
    assert cut.request == whole.request[-10:]
    assert cut.prefill == whole.prefill[:4]


CONVERSATION = (Message("user", "hello"), Message("assistant", "good day"), Message("user", "and now?"))
TAIL = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("response", [None, "an answer"])
@pytest.mark.parametrize(
    ("num_kept", "query"),
    [
        (512, "and now?" + TAIL),  # nothing is cut
        (30, "and now?" + TAIL),  # some of what comes before
        (8 + 13, "and now?" + TAIL),  # all of it
        (7 + 13, "nd now?" + TAIL),  # the first token of the query too
        (13, TAIL),  # the whole message
        (4, "ant\n"),
    ],
)
def test_the_query_of_a_cut_request_is_what_is_left_of_it(tiny: Pretrained, rows, response, num_kept: int, query: str):
    row = replace(rows[0], messages=CONVERSATION, response=response)
    whole, cut = (encode(row, ChatTemplate(tiny.tokenizer), Cut(num, 512)) for num in (512, num_kept))
    assert cut.request == whole.request[-num_kept:]
    assert cut.prefill == whole.prefill
    assert tiny.tokenizer.decode(cut.request[cut.query_start :]) == query


def test_the_mean_of_a_query_that_is_cut_is_that_of_what_is_left(tiny: Pretrained, rows: list[Row], tmp_path: Path):
    row = replace(rows[0], messages=CONVERSATION, response="an answer")
    cut = Cut(request_tokens=7 + 13, response_tokens=4)
    found = compute(tiny, [row], (-1,), cut, batch_tokens=500, cache=tmp_path)[0]
    ids = encode(row, ChatTemplate(tiny.tokenizer), Cut(512, 4))
    with torch.inference_mode():
        tokens = torch.tensor([[*ids.request[-20:], *ids.prefill]])
        plain = tiny.model(tokens, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(
        found.request.float(), torch.cat([plain[19], plain[:20].mean(dim=0)]), atol=2e-3, rtol=2e-3
    )
    torch.testing.assert_close(found.response.float(), plain[20:], atol=2e-3, rtol=2e-3)


def test_a_rerun_computes_only_what_is_missing(
    tiny: Pretrained, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(states_module, "SHARD_ROWS", 2)
    calls: list[int] = []
    plain = states_module.forward

    def interrupted(*arguments: Any) -> Shard:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return plain(*arguments)

    def run(cache: Path) -> list[torch.Tensor]:
        found = compute(tiny, rows, (-1,), CUT, batch_tokens=500, cache=cache)
        return [torch.cat([found[index].request, found[index].response.flatten()]) for index in range(len(found))]

    monkeypatch.setattr(states_module, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "one")
    files = set((tmp_path / "one" / "states").iterdir())
    times = {file: file.stat().st_mtime_ns for file in files}
    assert len(files) == 3

    monkeypatch.setattr(states_module, "forward", plain)
    resumed, fresh = run(tmp_path / "one"), run(tmp_path / "two")
    assert {file: file.stat().st_mtime_ns for file in files} == times
    assert all(torch.equal(one, two) for one, two in zip(resumed, fresh, strict=True))


def test_other_rows_layers_or_cuts_are_never_mistaken_for_cached_ones(
    tiny: Pretrained, rows: list[Row], tmp_path: Path
):
    def num_files(found: list[Row], layers: tuple[int, ...], cut: Cut) -> int:
        compute(tiny, found, layers, cut, batch_tokens=500, cache=tmp_path / "cache")
        return len(list((tmp_path / "cache" / "states").iterdir()))

    one = [rows[0]]
    assert num_files(one, (-1,), CUT) == 1
    assert num_files(one, (-1,), CUT) == 1
    assert num_files([replace(one[0], response="Another answer")], (-1,), CUT) == 2
    assert num_files(one, (0,), CUT) == 3
    assert num_files(one, (-1,), Cut(95, 20)) == 4


def test_rows_of_equal_tokens_and_another_query_are_never_mistaken_for_cached_ones(
    tiny: Pretrained, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    row = replace(rows[0], response=None)
    prompt = encode(row, ChatTemplate(tiny.tokenizer), CUT)
    for start in (prompt.query_start, 0):
        monkeypatch.setattr(states_module, "encode", lambda *_, start=start: replace(prompt, query_start=start))
        compute(tiny, [row], (-1,), CUT, batch_tokens=500, cache=tmp_path)
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_layers_and_cuts_beyond_the_model_are_refused(tiny: Pretrained, rows: list[Row], tmp_path: Path):
    with pytest.raises(RecipeError, match=r"layers -1 to 3, got \[4\]"):
        compute(tiny, rows, (4,), CUT, batch_tokens=500, cache=tmp_path)
    with pytest.raises(RecipeError, match="context is 512 tokens, got 768"):
        compute(tiny, rows, (-1,), Cut(512, 256), batch_tokens=500, cache=tmp_path)
