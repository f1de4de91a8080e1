"""The engine over a cache in pages, with real (tiny) models: what it says, and what it refuses."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest

from model.chat import EncodedPrompt, Message
from model.config import ClsConfig, Thresholds
from model.errors import InvalidRequest
from model.events import Finish, Release
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import SamplingParams
from model.scoring import score
from model.testing import ScriptedLM, tiny_guarded_lm
from server.engine.engine import EngineError
from server.engine.local import LocalEngine
from server.engine.paged import paged
from server.engine.runner import PagedRunner
from server.engine.scheduler import Candidate, Plan, plan
from server.engine.seats import Solos

SETTINGS: dict[str, Any] = {
    "cls": ClsConfig(windows=(3, 4, 3)),
    "request": Thresholds(block=0.999, flag=0.5),
    "response": Thresholds(block=0.52, flag=0.5),
    "onset": 0.4,
}
WAY: dict[str, Any] = {"temperature": 0.9, "top_logprobs": 0}


def ask(lm: GuardedLM, number: int) -> GenerationRequest:
    prompt = lm.chat.encode([Message("user", "Tell me" + " more" * (number % 9))])
    return GenerationRequest(prompt, 10 + 7 * (number % 4), SamplingParams(seed=number, **WAY), input=Mode.SCORE)


def said(events: list[Any]) -> tuple[list[int], str, str]:
    releases, finish = [e for e in events if isinstance(e, Release)], events[-1]
    assert isinstance(finish, Finish)
    ids = [token.token_id for release in releases for token in release.tokens]
    return ids, "".join(release.text for release in releases), finish.action


def with_engine(body: Callable[[LocalEngine], Coroutine[Any, Any, None]], num_pages: int | None = None) -> None:
    """Run `body` with an engine of a tiny model."""

    def seat(lm: GuardedLM) -> PagedRunner:
        runner = paged(lm, 8 << 20) if num_pages is None else PagedRunner(lm, num_pages)
        assert isinstance(runner, PagedRunner)
        return runner

    async def run() -> None:
        engine = LocalEngine(lambda: tiny_guarded_lm(**SETTINGS), seat=seat, max_running=24)
        await engine.start()
        await body(engine)
        runner = engine._worker.runner
        assert isinstance(runner, PagedRunner)
        assert runner.num_available == runner.pages.num_pages
        await engine.stop(drain_s=0)

    asyncio.run(run())


async def collect(engine: LocalEngine, name: str, request: GenerationRequest) -> list[Any]:
    return [event async for event in engine.submit(name, request)]


@pytest.mark.parametrize("num_pages", [None, 60])
def test_many_requests_at_once_say_what_each_says_alone(num_pages: int | None, monkeypatch):
    evicted: list[Any] = []
    evict = PagedRunner.evict
    monkeypatch.setattr(PagedRunner, "evict", lambda self, seat: evicted.append(seat) or evict(self, seat))
    begins_again: dict[str, int] = {}  # passes of those that lost their pages a step ago

    def planned(candidates: Sequence[Candidate], **how: int) -> Plan:
        begins_again.update((one.name, one.num_passes) for one in candidates if begins_again.get(one.name) == -1)
        found = plan(candidates, **how)
        begins_again.update(dict.fromkeys(found.evict, -1))
        return found

    monkeypatch.setattr("server.engine.worker.plan", planned)
    alone = tiny_guarded_lm(**SETTINGS)
    requests = [ask(alone, number) for number in range(24)]

    async def body(engine: LocalEngine) -> None:
        conversation = alone.chat.encode([Message("user", "hi"), Message("assistant", "x" * 99)], continue_final=True)
        scoring = asyncio.create_task(engine.score("score", conversation))
        found = await asyncio.gather(*(collect(engine, str(n), request) for n, request in enumerate(requests)))
        expected = [said(list(generate(alone, request))) for request in requests]
        assert [said(events) for events in found] == expected
        assert {action for *_, action in expected} == {"none", "rolled_back"}
        risks = [assessment.risk for assessment in (await scoring).assessments]
        assert risks == pytest.approx([one.risk for one in score(alone, conversation).assessments], abs=1e-4)

    with_engine(body, num_pages)
    assert bool(evicted) is bool(begins_again) is (num_pages is not None)
    assert not any(begins_again.values())  # none is behind what came after it


def test_what_would_end_another_engine_is_refused_and_harms_nobody():
    async def body(engine: LocalEngine) -> None:
        good = asyncio.create_task(collect(engine, "good", ask(engine.lm, 3)))
        await asyncio.sleep(0)
        request = ask(engine.lm, 1)
        ids = request.prompt.request
        bad = {
            "longer than the cache": replace(request, prompt=EncodedPrompt(ids * 12)),
            "longer than the cache with its answer": replace(request, max_tokens=400),
            "empty": replace(request, prompt=EncodedPrompt(())),
            "outside the vocabulary": replace(request, prompt=EncodedPrompt((*ids, 259))),
        }
        for name, one in bad.items():
            with pytest.raises(InvalidRequest):
                engine.submit(name, one)
        with pytest.raises(InvalidRequest, match="room for 320 tokens"):
            await engine.score("long", EncodedPrompt(ids * 12))
        assert isinstance((await good)[-1], Finish)
        assert isinstance((await collect(engine, "next", request))[-1], Finish)

    with_engine(body, 56)


def test_an_aborted_request_gives_its_pages_back():
    async def body(engine: LocalEngine) -> None:
        runner = engine._worker.runner
        ran: list[int] = []
        run = runner.run
        runner.run = lambda batch: ran.append(len(batch)) or run(batch)  # type: ignore[method-assign]  # it watches
        events = engine.submit("left", replace(ask(engine.lm, 1), max_tokens=200, output=Mode.OFF))
        await anext(events)
        await events.aclose()
        left_after = len(ran)
        async with asyncio.timeout(10):
            while runner.num_available < runner.pages.num_pages:
                await asyncio.sleep(0)
        assert len(ran) <= left_after + 1  # the step that was running when it left
        await collect(engine, "next", ask(engine.lm, 2))

    with_engine(body)


def test_a_fault_in_a_pass_ends_one_request_and_no_other(monkeypatch):
    async def body(engine: LocalEngine) -> None:
        runner = engine._worker.runner
        assert isinstance(runner, PagedRunner)
        lay = PagedRunner.lay

        def failing(self: PagedRunner, seat: Any, asked: Any, first: int) -> Any:
            if len(seat.prompt.request) == num_bad and seat.length > num_bad + 3:
                raise RuntimeError("a fault")
            return lay(self, seat, asked, first)

        bad, *good = (ask(engine.lm, number) for number in (8, 1, 2, 3))
        num_bad = len(bad.prompt.request)
        monkeypatch.setattr(PagedRunner, "lay", failing)
        names = enumerate([bad, *good])
        found = await asyncio.gather(*(collect(engine, str(n), one) for n, one in names), return_exceptions=True)
        assert isinstance(found[0], EngineError)
        alone = tiny_guarded_lm(**SETTINGS)
        assert [said(events) for events in found[1:]] == [said(list(generate(alone, one))) for one in good]

    with_engine(body)


def test_a_model_that_cannot_be_batched_runs_one_by_one(caplog):
    lm = tiny_guarded_lm()
    was = lm.model.config._attn_implementation
    lm.model.set_attn_implementation = lambda name: None  # as of a model that knows no registered attention
    assert isinstance(paged(lm), Solos)
    assert "sequences run one by one" in caplog.text
    assert lm.model.config._attn_implementation == was
    scripted = ScriptedLM("hello")
    assert Solos(scripted).longest == scripted.context_length


def test_a_cache_without_room_for_any_request_is_refused():
    with pytest.raises(EngineError, match="too few for any request; give it more memory"):
        paged(tiny_guarded_lm(), 1 << 10)
