"""Compiled layers, and the shipped model: each sequence gets what it gets alone."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from model.chat import EncodedPrompt, Message
from model.events import Finish, Release
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.passes import Pass
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import GREEDY
from model.testing import FAMILIES, tiny_guarded_lm
from model.widening import has_products
from server.engine.compiled import COMPILER
from server.engine.native import multiply_of
from server.engine.paged import paged
from server.engine.runner import PagedRunner
from server.engine.seats import run_one
from server.loading import load_model
from server.settings import Settings
from tests.server.together import HEAD, NEVER, OFTEN, SIGNALS, requests, together, told


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f != "llama")]
)
def test_compiled_layers_say_what_the_model_says(family: str):
    if shutil.which(COMPILER) is None:
        pytest.skip("there is no compiler")
    thresholds = {"request": NEVER, "response": OFTEN, "onset": 0.4}
    lm, alone = (tiny_guarded_lm(family, **SIGNALS["both"] | thresholds) for _ in range(2))
    counters.clear()
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs >= 2
    asked = requests(lm, 16)
    found = [told(events) for events in together(lm, asked, runner)]
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]
    expected = [told(list(generate(alone, request))) for request in asked]
    assert [exact for exact, _ in found] == [exact for exact, _ in expected]
    for (_, risks), (_, wanted) in zip(found, expected, strict=True):
        assert risks == pytest.approx(wanted, abs=1e-4)


@pytest.mark.weights
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
@pytest.mark.parametrize("checkpoint", ["smollm2-135m/all-rows", "smollm2-135m/deepened-signal"])
def test_the_shipped_model_says_beside_others_what_it_says_alone(checkpoint: str):
    lm, alone = (load_model(Settings(checkpoint=checkpoint, dtype="float32")) for _ in range(2))
    runner = paged(lm, 1 << 30, compiles=True)
    assert isinstance(runner, PagedRunner)
    asked = requests(lm, 200)
    found = together(lm, asked, runner, evicts=True)
    expected = [list(generate(alone, request)) for request in asked]
    num_flips = 0
    for request, ours, theirs in zip(asked, found, expected, strict=True):
        (exact, risks), (wanted, wanted_risks) = told(ours), told(theirs)
        if exact == wanted:
            assert risks == pytest.approx(wanted_risks, abs=1e-4)
        else:
            assert is_tie(alone, request, ours)
            num_flips += 1
    assert num_flips <= 2


def is_tie(alone: GuardedLM, request: GenerationRequest, ours: list[Release | Finish]) -> bool:
    """Tell whether a greedy response parts from what the model says alone where two tokens are as good as equal."""
    sampling = replace(request.sampling, top_logprobs=2)
    theirs = list(generate(alone, replace(request, sampling=sampling)))
    pairs = zip(*([token for one in events[:-1] for token in one.tokens] for events in (ours, theirs)), strict=False)
    (_, first), (_, second) = next(two for one, two in pairs if one.token_id != two.token_id).top_logprobs
    return sampling.temperature == 0.0 and first - second < 1e-5


def test_layers_that_compile_to_something_else_run_as_they_are(monkeypatch, caplog):
    def wrong(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            layer.forward = lambda states, *args, forward=layer.forward, **kwargs: -forward(states, *args, **kwargs)

    monkeypatch.setattr("server.engine.paged.compile_layers", wrong)
    lm, alone = tiny_guarded_lm(), tiny_guarded_lm()
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    assert "cannot be compiled" in caplog.text
    # Nothing that they gave is taken for what the model gives, not even for the same beginning.
    prompt = lm.chat.encode([Message("user", "Hello")])
    asked = [GenerationRequest(prompt, 8, GREEDY, input=Mode.OFF, output=Mode.OFF)]  # then it is read from shared pages
    (found,) = (told(events) for events in together(lm, asked, runner))
    assert found[0] == told(list(generate(alone, asked[0])))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within its compiler
def test_packed_and_compiled_layers_are_one_graph_for_a_row_and_one_for_many():
    has_product = multiply_of() is not None or has_products()
    if shutil.which(COMPILER) is None or not has_product:
        pytest.skip("there is no compiler, or no product in bfloat16")
    lm = tiny_guarded_lm(token_head=HEAD)
    lm.model.to(torch.bfloat16)
    with torch.inference_mode():
        expected = lm.model(torch.tensor([range(3, 40)])).logits[0, -1]
    counters.clear()
    runner = paged(lm, 8 << 20, compiles=True)
    assert isinstance(runner, PagedRunner)
    seat = runner.open(EncodedPrompt(tuple(range(3, 40))), watches_request=False)
    *_, last = (run_one(runner, seat, Pass(some)) for some in (range(3, 20), [20], range(21, 23), range(23, 39), [39]))
    assert torch.cosine_similarity(last.logits.float(), expected.float(), dim=0) > 0.999
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
