"""Many sequences in one pass: each gets what it gets alone."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from model.chat import EncodedPrompt, Message
from model.config import ClsConfig, RefusalConfig, Thresholds, TokenHeadConfig
from model.events import Finish, Release
from model.generation import Generation, generate
from model.guarded_lm import GuardedLM
from model.passes import Pass
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import GREEDY, SamplingParams
from model.testing import FAMILIES, tiny_guarded_lm
from server.engine.assessing import assess
from server.engine.compiled import COMPILER
from server.engine.kv_cache import Seat
from server.engine.native import multiply_of
from server.engine.paged import paged
from server.engine.runner import PagedRunner
from server.engine.seats import run_one
from server.loading import load_model
from server.settings import Settings

CLS = ClsConfig(windows=(3, 4, 3), schedule="annealed")
HEAD = TokenHeadConfig((1, -1), 32, 0)
SIGNALS = {
    "token": {"token_head": HEAD},
    "cls": {"token_head": None, "cls": CLS},
    "both": {"token_head": HEAD, "cls": CLS},
}
NEVER, OFTEN = Thresholds(block=0.999, flag=0.5), Thresholds(block=0.52, flag=0.5)


def with_signals(*families: str) -> list[Any]:
    """Return each family with each signal; what has one kind of signal alone is slow but for one family."""
    return [
        pytest.param(family, signal, marks=[] if signal == "both" or family == "llama" else [pytest.mark.slow])
        for family in families
        for signal in SIGNALS
    ]


SOME = with_signals("llama", "mistral", "gpt_neox")
"""Families of unlike attention: of all tokens, of a window, and with rotary angles for a part of each head."""


def requests(lm: GuardedLM, count: int, seed: int = 0) -> list[GenerationRequest]:
    """Return mixed requests: long and short, prefilled, greedy and sampled with any parameters, under any policy."""
    drawn = random.Random(seed)
    found = []
    for number in range(count):
        words = ["Tell me more."] if number % 3 else ["You are terse and kind to all.", "What is it?"]
        said = [Message("system", words[0])] if len(words) > 1 else []
        said += [Message("user", words[-1] + " And so on." * drawn.randint(0, 4) + str(number % 5))]
        prefill = number % 4 == 1
        if prefill:
            said.append(Message("assistant", "Well, " * drawn.randint(1, 4)))
        modes = {side: drawn.choice(list(Mode)) for side in ("input", "output")}
        prompt, most = lm.chat.encode(said, continue_final=prefill), drawn.randint(1, 40)
        stop = ("e", "th") if number % 6 == 5 else ()
        sampling = parameters(lm, drawn, number, most)
        found.append(GenerationRequest(prompt, most, sampling, stop, **modes, choice=number % 3))
    return found


def parameters(lm: GuardedLM, drawn: random.Random, number: int, most: int) -> SamplingParams:
    """Return sampling parameters of a request for `most` tokens; a third of them are the defaults."""
    given: dict[str, Any] = {"temperature": drawn.choice([0.0, 0.8]), "seed": number}
    given["top_logprobs"] = 2 if number % 2 else None
    if number % 3 == 0:
        return SamplingParams(**given)
    others = {
        "top_p": drawn.choice([0.5, 0.95]),
        "top_k": drawn.choice([2, 20]),
        "min_p": drawn.choice([0.05, 0.3]),
        "presence_penalty": drawn.choice([-1.0, 1.5]),
        "frequency_penalty": drawn.choice([-0.5, 1.0]),
        "repetition_penalty": drawn.choice([0.8, 1.3]),
        "logit_bias": {drawn.randrange(3, lm.vocab_size): drawn.choice([-100.0, 5.0])},
        "min_tokens": drawn.randint(1, most),
        "ignore_eos": True,
    }
    return SamplingParams(**given, **{name: others[name] for name in drawn.sample(sorted(others), 4)})


def together(
    lm: GuardedLM,
    asked: list[GenerationRequest],
    runner: PagedRunner | None = None,
    seed: int = 0,
    *,
    evicts: bool = False,
    leaves: bool = False,
):
    """Return the events of each request, some of them in each pass; of those that leave, events without an end.

    Args:
        lm: the model.
        asked: the requests.
        runner: runs the passes; one with 400 pages unless given.
        seed: of what runs together.
        evicts: in each step two sequences lose their pages.
        leaves: one in eight requests is given up in the middle.
    """
    runner, drawn = runner or PagedRunner(lm, 400), random.Random(seed)
    events = [[] for _ in asked]
    seats = {}
    steps = [Generation(lm, request, lm.schedule).run() for request in asked]
    waiting: dict[int, Pass] = {}

    def go_on(number: int, step: Callable[[], Pass | Release]) -> None:
        try:
            item = step()
            while not isinstance(item, Pass):
                events[number].append(item)
                item = next(steps[number])
            waiting[number] = item
        except StopIteration as end:
            events[number].append(end.value)
            runner.close(seats[number])

    arriving = list(enumerate(asked))
    while waiting or arriving:
        for number, one in [arriving.pop(0) for _ in range(min(len(arriving), drawn.randint(1, 6)))]:
            seats[number] = runner.open(one.prompt, watches_request=one.input is not Mode.OFF)
            go_on(number, lambda number=number: next(steps[number]))
        chosen = drawn.sample(sorted(waiting), drawn.randint(1, len(waiting)))
        for number in drawn.sample(sorted(waiting), 2) if evicts and len(waiting) > 2 else ():
            runner.evict(seats[number])
        for number in [number for number in chosen if leaves and number % 8 == 7 and len(events[number]) > 3]:
            steps[number].close()
            runner.close(seats[number])
            del waiting[number]
            chosen.remove(number)
        passes = {number: runner.next_pass(seats[number], waiting[number]) for number in chosen}
        passed = runner.run([(seats[number], passes[number]) for number in chosen])
        for number, found in zip(chosen, passed, strict=True):
            if passes[number] is waiting[number]:
                del waiting[number]
                go_on(number, lambda number=number, found=found: steps[number].send(found))
    assert runner.pages.num_available == runner.pages.num_pages
    return events


def told(events: list[Release | Finish]):
    """Return what a client sees of events, and the risks."""
    *releases, finish = events
    tokens = [token for release in releases for token in release.tokens]
    exact = (
        "".join(release.text for release in releases),
        [(token.token_id, [number for number, _ in token.top_logprobs]) for token in tokens],
        replace(finish, request_risk=None, response_risk=None),
    )
    near = [finish.request_risk, finish.response_risk, *(token.risk for token in tokens)]
    near += [value for token in tokens for value in (token.logprob, *(of_one for _, of_one in token.top_logprobs))]
    return exact, [-1.0 if value is None else value for value in near]


@pytest.mark.parametrize(("family", "signal"), with_signals(*FAMILIES))
def test_each_sequence_says_what_it_says_alone(family: str, signal: str):
    check_each_sequence(family, signal, is_hard=False)


@pytest.mark.parametrize(("family", "signal"), SOME)
def test_in_small_pieces_and_evicted_in_between_each_says_so_too(family: str, signal: str, monkeypatch):
    for module in ("model.generation", "server.engine.kv_cache"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK", 24)
    check_each_sequence(family, signal, is_hard=True)


def check_each_sequence(family: str, signal: str, *, is_hard: bool) -> None:
    """Compare 16 requests that run together with each of them alone."""
    thresholds = {"request": OFTEN if is_hard else NEVER, "response": OFTEN, "onset": 0.4}
    lm = tiny_guarded_lm(family, **SIGNALS[signal] | thresholds)
    alone = tiny_guarded_lm(family, **SIGNALS[signal] | thresholds)
    asked = requests(lm, 16)
    found = [told(events) for events in together(lm, asked, evicts=is_hard)]
    expected = [told(list(generate(alone, request))) for request in asked]
    assert [exact for exact, _ in found] == [exact for exact, _ in expected]
    for (_, risks), (_, wanted) in zip(found, expected, strict=True):
        assert risks == pytest.approx(wanted, abs=1e-4)
    actions = {exact[2].action for exact, _ in found}
    assert "none" in actions
    assert actions & {"refused", "rolled_back"}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["annealed", "every", "first", "periodic-3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_200_requests_each_says_what_it_says_alone(family: str, schedule: str, monkeypatch):
    for module in ("model.generation", "server.engine.kv_cache"):
        monkeypatch.setattr(f"{module}.PREFILL_CHUNK", 24)
    thresholds = {"request": OFTEN, "response": OFTEN, "onset": 0.4}
    signal = {"token_head": HEAD if schedule != "first" else None, "cls": replace(CLS, schedule=schedule)}
    lm, alone = (tiny_guarded_lm(family, **signal | thresholds) for _ in range(2))
    cached = []
    opened = PagedRunner.open

    def noted(self: PagedRunner, *args: Any, **how: Any) -> Seat:
        seat = opened(self, *args, **how)
        cached.append(seat.num_cached)
        return seat

    monkeypatch.setattr(PagedRunner, "open", noted)
    asked = requests(lm, 200)
    found = together(lm, asked, PagedRunner(lm, 800), evicts=True, leaves=True)
    num_left = num_ties = 0
    for request, ours in zip(asked, found, strict=True):
        theirs = list(generate(alone, request))
        if not isinstance(ours[-1], Finish):  # it left: what it was told is the beginning of what it would have been
            num_left += 1
            assert [one.text for one in ours] == [one.text for one in theirs[: len(ours)]]
            continue
        (exact, near), (wanted, wanted_near) = told(ours), told(theirs)
        if exact != wanted:
            assert differ_in_ties(ours, theirs)
            num_ties += 1
        assert near == pytest.approx(wanted_near, abs=1e-4)
    assert num_ties <= 1
    assert num_left > 3
    assert sum(count > 0 for count in cached) > 20


def differ_in_ties(ours: list[Release | Finish], theirs: list[Release | Finish]) -> bool:
    """Tell whether responses differ in nothing but which of equally likely tokens are named as the likeliest."""

    def split(events: list[Release | Finish]):
        text, tokens, finish = told(events)[0]
        named = [value for one in events[:-1] for token in one.tokens for _, value in token.top_logprobs]
        return (text, [token_id for token_id, _ in tokens], finish), named

    (exact, near), (wanted, wanted_near) = split(ours), split(theirs)
    return exact == wanted and near == pytest.approx(wanted_near, abs=1e-5)


@pytest.mark.parametrize(("family", "signal"), SOME)
def test_refusals_that_are_drawn_again_are_those_that_are_drawn_again_alone(family: str, signal: str):
    changes = {"request": NEVER, "redraw_below": 0.998, "refusal": RefusalConfig(prefix="sssssssss")}
    lm, alone = (tiny_guarded_lm(family, **SIGNALS[signal] | changes) for _ in range(2))
    (letter,) = lm.tokenizer.encode("s", add_special_tokens=False)
    others = {token: -100.0 for token in range(lm.vocab_size) if token != letter}  # "s" first, then anything
    asked = [
        replace(one, sampling=replace(one.sampling, logit_bias=others)) if number % 2 else one
        for number, one in enumerate(requests(lm, 16))
    ]
    found = [told(events) for events in together(lm, asked, evicts=True)]
    expected = [told(list(generate(alone, request))) for request in asked]
    assert [exact for exact, _ in found] == [exact for exact, _ in expected]
    for (_, risks), (_, wanted) in zip(found, expected, strict=True):
        assert risks == pytest.approx(wanted, abs=1e-4)
    assert any(text[1:7] == "ssssss" != text[:6] for (text, _, _), _ in found)


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
    has_product = multiply_of() is not None or torch.ops.mkldnn._is_mkldnn_bf16_supported()
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


def test_a_shared_beginning_is_fed_once_and_nothing_else_changes():
    lm, alone = tiny_guarded_lm(), tiny_guarded_lm()
    runner = PagedRunner(lm, 100)
    system = Message("system", "You are terse and kind to everybody who comes here and asks.")
    prompts = [lm.chat.encode([system, Message("user", text)]) for text in ("What is it?", "Who is it?")]
    found = []
    for prompt in prompts:
        seat = runner.open(prompt)
        asked = Pass(prompt.request, num_query=len(prompt.request) - prompt.query_start, asks_request=True)
        (passed,) = runner.run([(seat, asked)])
        found.append((seat.num_cached, passed.request))
        runner.close(seat)
    assert found[0][0] == 0 < found[1][0] <= prompts[1].query_start
    for prompt, (_, request) in zip(prompts, found, strict=True):
        *_, finish = generate(alone, GenerationRequest(prompt, 1, input=Mode.SCORE, output=Mode.OFF))
        assert torch.sigmoid(torch.tensor(request)).item() == pytest.approx(finish.request_risk, abs=1e-5)
    assert runner.open(prompts[1], salt="another").num_cached == 0
    assert runner.open(prompts[1], watches_request=False).num_cached > found[1][0]


def test_a_pass_says_beforehand_how_many_pages_it_takes():
    lm = tiny_guarded_lm(cls=CLS)
    runner = PagedRunner(lm, 3)
    prompt = lm.chat.encode([Message("user", "a" * 60)])
    seat = runner.open(prompt)
    asked = Pass(prompt.request)
    assert runner.size_of(seat, asked) == (len(prompt.request), -(-len(prompt.request) // 16), 0)
    (fault,) = runner.run([(seat, asked)])
    assert "pages are needed, 3 are there" in str(fault)


def test_a_fault_that_is_tried_again_leaves_nothing_behind(monkeypatch):
    lm, alone = tiny_guarded_lm(token_head=HEAD), tiny_guarded_lm(token_head=HEAD)
    faults = [RuntimeError("a fault")] * 3

    def failing(lm: GuardedLM, batch, *more):
        found = assess(lm, batch, *more)
        if len(batch) > 1 and faults:
            raise faults.pop()
        return found

    monkeypatch.setattr("server.engine.runner.assess", failing)
    asked = requests(lm, 4)
    found, expected = together(lm, asked, seed=1), [list(generate(alone, request)) for request in asked]
    assert not faults
    assert [told(events)[0] for events in found] == [told(events)[0] for events in expected]
    for events, wanted in zip(found, expected, strict=True):
        assert told(events)[1] == pytest.approx(told(wanted)[1], abs=1e-4)


def test_what_others_have_read_meanwhile_is_not_read_again():
    lm = tiny_guarded_lm()
    runner = PagedRunner(lm, 100)
    prompt = lm.chat.encode([Message("system", "You are terse and kind to all." * 3), Message("user", "What is it?")])
    seats = [runner.open(prompt) for _ in range(2)]
    asked = Pass(prompt.request, num_query=len(prompt.request) - prompt.query_start, asks_request=True)
    runner.run([(seats[0], asked)])
    assert runner.size_of(seats[1], asked).num_rows == len(prompt.request)
    assert runner.next_pass(seats[1], asked) is asked
    num_rows = len(prompt.request) - prompt.query_start // 16 * 16
    assert runner.size_of(seats[1], asked).num_rows == num_rows
