import asyncio

import pytest

from model.chat import Message
from model.events import Finish
from model.policy import Mode
from model.request import GenerationRequest
from model.testing import ScriptedLM
from server.engine.engine import EngineError, EngineState
from server.engine.worker import SequentialEngine


def request_for(lm: ScriptedLM) -> GenerationRequest:
    prompt = lm.chat.encode([Message("user", "hi")])
    return GenerationRequest(prompt, max_tokens=50, input=Mode.SCORE, output=Mode.SCORE)


async def collect(engine: SequentialEngine, name: str) -> list[object]:
    return [event async for event in engine.submit(name, request_for(engine.lm))]


def test_a_fault_in_one_request_ends_that_request_and_no_other():
    async def run() -> None:
        # The warm-up takes 5 passes; the 10th is in the middle of the first two requests.
        engine = SequentialEngine(lambda: ScriptedLM("a long enough answer", fails_at=10))
        await engine.start()
        outcomes = await asyncio.gather(collect(engine, "a"), collect(engine, "b"), return_exceptions=True)
        assert sorted(type(outcome) is EngineError for outcome in outcomes) == [False, True]
        assert isinstance((await collect(engine, "c"))[-1], Finish)
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_worker_that_dies_ends_every_request_and_takes_no_more():
    async def run() -> None:
        engine = SequentialEngine(lambda: ScriptedLM("an answer"))
        await engine.start()

        def broken() -> bool:
            raise MemoryError

        engine._receive = broken  # type: ignore[method-assign]  # the fault to test
        with pytest.raises(EngineError, match="must be restarted"):
            await collect(engine, "running")
        assert engine.state is EngineState.STOPPED
        with pytest.raises(EngineError, match="stopped"):
            engine.submit("late", request_for(engine.lm))
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_an_aborted_request_that_waits_leaves_the_queue():
    async def run() -> None:
        engine = SequentialEngine(lambda: ScriptedLM("x" * 400), max_running=1, max_waiting=1)
        await engine.start()
        first = engine.submit("first", request_for(engine.lm))
        await anext(first)
        waiting = engine.submit("waiting", request_for(engine.lm))
        await waiting.aclose()
        for _ in range(3):  # a few passes of the first one
            await anext(first)
        await asyncio.sleep(0)
        engine.submit("next", request_for(engine.lm))
        await engine.stop(drain_s=0)

    asyncio.run(run())
