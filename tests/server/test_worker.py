import asyncio
import logging
import math
import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from model.chat import EncodedPrompt, Message
from model.config import Side
from model.events import Finish, HeadWork
from model.generation import PREFILL_CHUNK
from model.guarded_lm import Assessed, StepOutput
from model.policy import Mode
from model.request import GenerationRequest
from model.scoring import steps as scoring
from model.testing import ScriptedLM, tiny_guarded_lm
from server.engine.engine import EngineError, EngineState, Overloaded
from server.engine.jobs import Job, Mail
from server.engine.local import LocalEngine
from server.engine.runner import PagedRunner
from server.engine.seats import Solos
from server.engine.worker import MOST_BARREN, MOST_FAULTS, Worker


def request_for(lm: ScriptedLM) -> GenerationRequest:
    prompt = lm.chat.encode([Message("user", "hi")])
    return GenerationRequest(prompt, max_tokens=50, input=Mode.SCORE, output=Mode.SCORE)


async def collect(engine: LocalEngine, name: str) -> list[object]:
    return [event async for event in engine.submit(name, request_for(engine.lm))]


class GatedLM(ScriptedLM):
    """Waits in every full piece of a prompt until it may go on."""

    def __init__(self, script: str) -> None:
        super().__init__(script)
        self.context_length = 8192
        self.is_in_a_piece = threading.Event()
        self._may_go_on = threading.Semaphore(0)

    def forward(self, token_ids: Sequence[int], *args: Any, **kwargs: Any) -> StepOutput:
        if len(token_ids) == PREFILL_CHUNK:
            self.is_in_a_piece.set()
            assert self._may_go_on.acquire(timeout=10)
        return super().forward(token_ids, *args, **kwargs)

    def go_on(self, num_pieces: int = 100) -> None:
        self._may_go_on.release(num_pieces)

    @property
    def num_pieces(self) -> int:
        return sum(len(ids) == PREFILL_CHUNK for ids in self.fed)


def long_prompt(lm: ScriptedLM) -> EncodedPrompt:
    return lm.chat.encode([Message("user", "x" * 2000), Message("assistant", "y" * 2000)], continue_final=True)


async def until_in_a_piece(lm: GatedLM) -> None:
    assert await asyncio.to_thread(lm.is_in_a_piece.wait, 10)


def test_a_fault_in_one_request_ends_that_request_and_no_other():
    async def run() -> None:
        # The warm-up takes 5 passes; the 10th is in the middle of the first two requests.
        engine = LocalEngine(lambda: ScriptedLM("a long enough answer", fails_at=10))
        await engine.start()
        outcomes = await asyncio.gather(collect(engine, "a"), collect(engine, "b"), return_exceptions=True)
        assert sorted(type(outcome) is EngineError for outcome in outcomes) == [False, True]
        assert isinstance((await collect(engine, "c"))[-1], Finish)
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_worker_that_dies_ends_every_request_and_takes_no_more():
    async def run() -> None:
        engine = LocalEngine(lambda: ScriptedLM("an answer"))
        await engine.start()

        def broken() -> bool:
            raise MemoryError

        engine._worker._receive = broken  # type: ignore[method-assign]  # the fault to test
        with pytest.raises(EngineError, match=r"started again|must be restarted"):
            await collect(engine, "running")
        while engine.state is not EngineState.STOPPED:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="stopped"):
            engine.submit("late", request_for(engine.lm))
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_worker_that_fails_once_ends_what_runs_and_serves_what_waits_and_what_comes(caplog):
    async def run() -> None:
        lm = GatedLM("hello")
        engine = LocalEngine(lambda: lm, max_running=1)
        await engine.start()
        running = asyncio.create_task(engine.score("running", long_prompt(lm)))
        await until_in_a_piece(lm)
        waiting = asyncio.create_task(collect(engine, "waiting"))
        await asyncio.sleep(0)
        receive = engine._worker._receive

        def broken() -> bool:
            engine._worker._receive = receive  # type: ignore[method-assign]  # as it was
            raise MemoryError

        engine._worker._receive = broken  # type: ignore[method-assign]  # the fault to test
        lm.go_on()
        with pytest.raises(EngineError, match="has started again; it is safe to retry"):
            await running
        assert isinstance((await waiting)[-1], Finish)
        assert isinstance((await collect(engine, "next"))[-1], Finish)
        assert (engine.state, engine.stats().num_restarts, engine.stats().num_waiting) == (EngineState.READY, 1, 0)
        await engine.stop(drain_s=0)

    asyncio.run(run())
    assert "goes on without its running requests: MemoryError" in caplog.text


class Sticky(Solos):
    """Its passes fail as long as `is_broken`."""

    is_broken = False

    def run(self, batch):
        return [RuntimeError("the device is gone") for _ in batch] if self.is_broken else super().run(batch)


async def in_vain(engine: LocalEngine, count: int) -> None:
    for number in range(count):
        with pytest.raises(EngineError):
            await collect(engine, f"request {number}")


def test_an_engine_whose_passes_all_fail_starts_again_and_in_the_end_gives_up():
    async def run() -> None:
        engine = LocalEngine(lambda: ScriptedLM("an answer"), seat=Sticky)
        await engine.start()
        engine._worker.runner.is_broken = True
        await in_vain(engine, MOST_FAULTS * MOST_BARREN)
        async with asyncio.timeout(10):
            while engine.state is not EngineState.STOPPED:
                await asyncio.sleep(0.01)
        assert engine.stats().num_restarts == MOST_FAULTS - 1
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_device_that_comes_back_serves_again():
    async def run() -> None:
        engine = LocalEngine(lambda: ScriptedLM("an answer"), seat=Sticky)
        await engine.start()
        engine._worker.runner.is_broken = True
        await in_vain(engine, MOST_BARREN)
        async with asyncio.timeout(10):
            while not engine.stats().num_restarts:
                await asyncio.sleep(0.01)
        engine._worker.runner.is_broken = False
        assert isinstance((await collect(engine, "next"))[-1], Finish)
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_worker_in_doubt_has_pages_for_its_warm_up():
    async def run() -> None:
        lm = tiny_guarded_lm()
        runner = PagedRunner(lm, 8)
        mail = Mail(asyncio.get_running_loop(), lambda job: None)
        worker = Worker(lm, runner, queue.SimpleQueue(), mail, max_running=4)
        prompt = EncodedPrompt((5,) * 100)
        worker._begin(Job("long", prompt, lambda lm: scoring(lm, lm.config, prompt)))
        seat = worker._running[0].seat
        runner.run([(seat, worker._running[0].asked)])
        assert runner.num_available <= 1
        worker._num_barren = MOST_BARREN - 1
        worker._doubt()
        assert runner.num_available == 8
        assert worker._step()  # what it had is computed again

    asyncio.run(run())


def test_requests_that_fail_by_themselves_are_no_fault_of_the_engine():
    async def run() -> None:
        lm = ScriptedLM("an answer")
        engine = LocalEngine(lambda: lm)
        await engine.start()
        runner = engine._worker.runner
        fine = runner.run
        poisoned = EncodedPrompt((*request_for(lm).prompt.request, 7))
        runner.run = lambda batch: [  # type: ignore[method-assign]  # the fault to test
            RuntimeError("poison") if 7 in asked.token_ids else fine([(seat, asked)])[0] for seat, asked in batch
        ]
        for number in range(4 * MOST_BARREN):
            with pytest.raises(EngineError, match="failed on this request"):
                await engine.score(f"poison {number}", poisoned)
        assert isinstance((await collect(engine, "next"))[-1], Finish)
        assert (engine.state, engine.stats().num_restarts) == (EngineState.READY, 0)
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_an_aborted_request_that_waits_leaves_the_queue():
    async def run() -> None:
        lm = GatedLM("hello")
        engine = LocalEngine(lambda: lm, max_running=1, max_waiting=1)
        await engine.start()
        running = asyncio.create_task(engine.score("running", long_prompt(lm)))
        await until_in_a_piece(lm)
        waiting = engine.submit("waiting", request_for(lm))
        with pytest.raises(Overloaded):
            engine.submit("too many", request_for(lm))
        await waiting.aclose()
        lm.go_on(1)  # it waits again in the next piece
        while engine.stats().num_waiting:
            await asyncio.sleep(0.001)
        assert lm.num_pieces == 1  # and not only when the step is over
        engine.submit("next", request_for(lm))
        running.cancel()
        lm.go_on()
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_scoring_a_long_conversation_lets_others_have_their_turns():
    async def run() -> None:
        lm = GatedLM("hello")
        engine = LocalEngine(lambda: lm)
        await engine.start()
        scoring = asyncio.create_task(engine.score("long", long_prompt(lm)))
        await until_in_a_piece(lm)
        generating = asyncio.create_task(collect(engine, "short"))
        await asyncio.sleep(0)
        lm.go_on()
        assert isinstance((await generating)[-1], Finish)
        assert (await scoring).position == 2000
        sizes = [len(ids) for ids in lm.fed]
        pieces = [index for index, size in enumerate(sizes) if size == PREFILL_CHUNK]
        assert len(pieces) == 7
        assert sizes[pieces[1] : pieces[-1]].count(1) >= 3  # tokens of the other answer
        await engine.stop(drain_s=0)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["cancelled", "aborted"])
def test_scoring_that_nobody_waits_for_ends_after_the_piece_it_is_in(how: str):
    async def run() -> None:
        lm = GatedLM("hello")
        engine = LocalEngine(lambda: lm)
        await engine.start()
        scoring = asyncio.create_task(engine.score("long", long_prompt(lm)))
        await until_in_a_piece(lm)
        if how == "cancelled":
            scoring.cancel()
        else:
            engine.abort("long")
        (outcome,) = await asyncio.gather(scoring, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError if how == "cancelled" else EngineError)
        lm.go_on()
        assert isinstance((await collect(engine, "next"))[-1], Finish)
        assert lm.num_pieces == 1
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_place_is_free_as_soon_as_the_answer_is_read():
    async def run() -> None:
        engine = LocalEngine(lambda: ScriptedLM("ab"), max_running=1, max_waiting=0)
        await engine.start()
        prompt = request_for(engine.lm).prompt
        for index in range(20):
            await engine.score(f"score-{index}", prompt)
            async for event in engine.submit(f"chat-{index}", request_for(engine.lm)):
                if isinstance(event, Finish):
                    break
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_what_the_head_did_is_counted_for_aborted_requests_and_for_scoring_too():
    class BrokenLM(GatedLM):
        """Its head gives no number for any response, once it is broken."""

        is_broken = False

        def assess(self, side: Side, features: Tensor) -> Assessed:
            found = super().assess(side, features)
            is_failed = self.is_broken and side == "response"
            return found._replace(logits=[math.inf] * len(features)) if is_failed else found

    async def run() -> None:
        lm = BrokenLM("x" * 400)
        engine = LocalEngine(lambda: lm)
        await engine.start()
        assert engine.stats().head == HeadWork()  # the warm-up is no request
        num_warm_up = len(lm.fed)
        lm.is_broken = True
        events = engine.submit("left", request_for(lm))
        for _ in range(10):
            await anext(events)
        await events.aclose()
        await engine.score(
            "short", lm.chat.encode([Message("user", "hi"), Message("assistant", "abc")], continue_final=True)
        )
        num_passes = len(lm.fed) - num_warm_up
        head = engine.stats().head
        # One assessment per pass: the request's, which works, then one per token; and four in one pass.
        assert (head.num_assessments, head.num_failures) == (num_passes - 1 + 4, num_passes - 2 + 3)
        await engine.stop(drain_s=0)

    asyncio.run(run())


def test_a_fault_is_logged_with_its_place_and_without_its_message(caplog):
    class FailingLM(ScriptedLM):
        """Fails once, with a message that quotes the user."""

        def forward(self, *args: Any, **kwargs: Any) -> StepOutput:
            step = super().forward(*args, **kwargs)
            if len(self.fed) == 9:
                raise ValueError(" ".join(["my", "darkest", "thought"]))
            return step

    async def run() -> None:
        engine = LocalEngine(lambda: FailingLM("a long enough answer"))
        await engine.start()
        with pytest.raises(EngineError, match="safe to retry"):
            await collect(engine, "a")

        def broken() -> bool:
            raise MemoryError(" ".join(["my", "darkest", "thought"]))

        engine._worker._receive = broken  # type: ignore[method-assign]  # the fault to test
        with pytest.raises(EngineError, match=r"started again|must be restarted"):
            await collect(engine, "b")
        while engine.state is not EngineState.STOPPED:
            await asyncio.sleep(0.01)
        await engine.stop(drain_s=0)

    with caplog.at_level(logging.DEBUG):
        asyncio.run(run())
    assert "request a failed: ValueError at " in caplog.text
    assert "thread failed: MemoryError at " in caplog.text
    assert "goes on without its running requests: MemoryError at " in caplog.text
    assert caplog.text.count("test_worker.py:") == 1 + MOST_FAULTS
    assert "my darkest" not in caplog.text
