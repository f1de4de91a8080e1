"""The engine of this process: the one thread that touches the model.

Step by step it asks every running sequence which forward pass it wants next, lets the scheduler choose among them, has
the runner run those together, and hands each sequence what came of its own. A fault in one sequence ends that sequence
and no other.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Generic, TypeVar, cast

from model.chat import EncodedPrompt, Message
from model.errors import ContextLengthError, InvalidRequest, origin
from model.events import Event, HeadWork, Release
from model.generation import Generation
from model.guarded_lm import GuardedLM
from model.passes import Pass, Passed, Steps
from model.policy import Mode
from model.request import GenerationRequest, admit, check_prompt
from model.sampling import GREEDY
from model.scoring import steps as scoring
from model.trace import Trace
from server.engine.engine import EngineError, EngineState, EngineStats, Overloaded
from server.engine.scheduler import Candidate, plan
from server.engine.seats import Runner, Solos

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_S = 1
_END = object()


@dataclass(eq=False)
class _Job(Generic[T]):
    """One request on its way through the worker. Shared by both threads; each field has one writer."""

    request_id: str
    prompt: EncodedPrompt
    watches_request: bool
    begin: Callable[[GuardedLM], Steps[T, T]]
    loop: asyncio.AbstractEventLoop
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    is_aborted: bool = False  # written by the event loop, read by the worker
    # The rest is the worker's alone.
    arrival: int = 0
    num_passes: int = 0
    steps: Steps[T, T] | None = None
    seat: Any = None
    asked: Pass | None = None

    def post(self, item: object) -> None:
        """Hand an item to the event loop; called by the worker."""
        try:
            self.loop.call_soon_threadsafe(self.outbox.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody is listening any more
            self.is_aborted = True


class _Items(Generic[T]):
    """The results of a job as an async iterator; closing it aborts the job, even before it began."""

    def __init__(self, job: _Job[T]) -> None:
        self._job = job
        self._is_over = False

    def __aiter__(self) -> "_Items[T]":
        return self

    async def __anext__(self) -> T:
        if self._is_over:
            raise StopAsyncIteration
        try:
            item = await self._job.outbox.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if item is _END:
            self._is_over = True
            raise StopAsyncIteration
        if isinstance(item, Exception):
            self._is_over = True
            raise item
        return item  # type: ignore[no-any-return]  # the queue mixes items, errors and the end

    async def aclose(self) -> None:
        """Abort the job."""
        self._is_over = True
        self._job.is_aborted = True


class LocalEngine:
    """Generates in one background thread.

    Args:
        load: returns the model; called once, in the background thread.
        seat: returns what runs the passes of the model's sequences; by default each alone, which any model can.
        max_running: sequences that run at a time; the others wait.
        max_waiting: requests that may wait; more are refused with `Overloaded`.
    """

    def __init__(
        self,
        load: Callable[[], GuardedLM],
        *,
        seat: Callable[[GuardedLM], Runner] = Solos,
        max_running: int = 8,
        max_waiting: int = 64,
    ) -> None:
        self._load = load
        self._seat = seat
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._jobs: dict[str, _Job[Any]] = {}  # event loop only
        self._arrivals = count()  # worker only, as the next two
        self._running: list[_Job[Any]] = []  # its length may be read
        self._waiting: list[_Job[Any]] = []
        self._head = HeadWork()  # written by the worker, read by the event loop
        self._state = EngineState.STARTING
        self._lm: GuardedLM | None = None
        self._runner: Runner | None = None
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> EngineState:
        """Where in its life the engine is."""
        return self._state

    @property
    def lm(self) -> GuardedLM:
        """The loaded model.

        Raises:
            EngineError: before `start` has returned.
        """
        if self._lm is None:
            raise EngineError("the model is still loading")
        return self._lm

    async def start(self) -> None:
        """Load and warm up; return when the first request can be served.

        Raises:
            ModelError: the weights or the checkpoint cannot be loaded.
            EngineError: the safety head fails on a harmless request.
        """
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[GuardedLM] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, ready), name="ballast-engine", daemon=True)
        self._thread.start()
        self._lm = await ready
        if self._state is EngineState.STARTING:  # not if it was stopped meanwhile
            self._state = EngineState.READY

    async def stop(self, *, drain_s: float) -> None:
        """Take no new requests, let the running ones end for `drain_s` seconds, then abort them."""
        self._state = EngineState.DRAINING
        deadline = asyncio.get_running_loop().time() + drain_s
        while self._jobs and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for job in list(self._jobs.values()):
            job.is_aborted = True
            job.outbox.put_nowait(EngineError("the server is shutting down"))
        self._inbox.put(None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._state = EngineState.STOPPED

    def submit(self, request_id: str, request: GenerationRequest) -> _Items[Event]:
        """Queue a request and return its events; see `Engine.submit`."""
        lm = self.lm
        admit(lm, request)
        self._check_room(request.prompt, request.max_tokens)
        is_watched = request.input is not Mode.OFF
        return _Items(
            self._queue(request_id, request.prompt, lambda lm: Generation(lm, request, lm.schedule).run(), is_watched)
        )

    def abort(self, request_id: str) -> None:
        """Forget a request before its next forward pass. Unknown ids are ignored."""
        if (job := self._jobs.get(request_id)) is not None:
            job.is_aborted = True
            job.outbox.put_nowait(EngineError("the request was aborted"))

    async def score(self, request_id: str, prompt: EncodedPrompt) -> Trace:
        """Return the trace of a conversation, generating nothing; see `Engine.score`."""
        lm = self.lm
        check_prompt(lm, prompt)
        if (config := lm.config) is None:
            raise InvalidRequest("this model carries no safety signal", param="model")
        self._check_room(prompt, 0)
        async for item in _Items(self._queue(request_id, prompt, lambda lm: scoring(lm, config, prompt))):
            if isinstance(item, Trace):
                return item
        raise EngineError("the engine gave no trace")

    def stats(self) -> EngineStats:
        """Return what the engine is doing now, and did so far."""
        num_running = len(self._running)
        return EngineStats(num_running, max(0, len(self._jobs) - num_running), self._head)

    def _check_room(self, prompt: EncodedPrompt, max_tokens: int) -> None:
        """Refuse what the cache could not hold even alone.

        Raises:
            ContextLengthError: saying how much it holds.
        """
        num_prompt = len(prompt.request) + len(prompt.prefill)
        if self._runner is not None and num_prompt + max_tokens > (room := self._runner.longest):
            raise ContextLengthError(
                f"the server has room for {room} tokens of a conversation, but the messages have {num_prompt} and "
                f"max_tokens asks for {max_tokens} more",
                param="messages" if num_prompt >= room else "max_tokens",
            )

    def _queue(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        begin: Callable[[GuardedLM], Steps[Any, Any]],
        watches_request: bool = True,
    ) -> _Job[Any]:
        """Hand a job to the worker."""
        if self._state is not EngineState.READY:
            raise EngineError(f"the engine is {self._state.value}")
        if request_id in self._jobs:
            raise EngineError(f"request id {request_id} is in use")
        if len(self._jobs) >= self._max_running + self._max_waiting:
            raise Overloaded(f"{len(self._jobs)} requests are running or waiting", retry_after_s=RETRY_AFTER_S)
        job: _Job[Any] = _Job(request_id, prompt, watches_request, begin, asyncio.get_running_loop())
        self._jobs[request_id] = job
        self._inbox.put(job)
        return job

    def _run(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[GuardedLM]") -> None:
        """Load, then serve until told to stop. The body of the background thread."""
        try:
            lm = self._load()
            self._runner = runner = self._seat(lm)
            _warm_up(lm, runner)
        except BaseException as error:
            _settle(loop, ready, error)
            return
        _settle(loop, ready, lm)
        try:
            self._serve(lm, runner)
        except BaseException as error:
            logger.critical("the engine's thread failed: %s", origin(error))
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._fail)

    def _fail(self) -> None:
        """Stop taking requests and end all that wait for one; called when the worker is gone."""
        self._state = EngineState.STOPPED
        for job in self._jobs.values():
            job.outbox.put_nowait(EngineError("the engine has failed; the server must be restarted"))
        self._jobs.clear()

    def _serve(self, lm: GuardedLM, runner: Runner) -> None:
        """Run step after step until told to stop."""
        while self._receive():
            self._drop_aborted(runner)
            while self._waiting and len(self._running) < self._max_running:
                self._begin(lm, runner, self._waiting.pop(0))
            if self._running:
                self._step(runner)

    def _receive(self) -> bool:
        """Take what has arrived, waiting only when there is nothing to do; False means stop."""
        try:
            while True:
                job = self._inbox.get(block=not self._running and not self._waiting)
                if job is None:
                    return False
                self._waiting.append(job)
        except queue.Empty:
            return True

    def _drop_aborted(self, runner: Runner) -> None:
        """Forget what nobody waits for any more."""
        for job in [job for job in (*self._waiting, *self._running) if job.is_aborted]:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._leave(runner, job)
            self._forget(job)

    def _begin(self, lm: GuardedLM, runner: Runner, job: _Job[Any]) -> None:
        """Let a job run: it has a seat, and says which pass it wants first."""
        job.arrival, job.steps = next(self._arrivals), job.begin(lm)
        job.seat = runner.open(job.prompt, watches_request=job.watches_request)
        self._running.append(job)
        self._go_on(runner, job, None)

    def _step(self, runner: Runner) -> None:
        """Run one pass of some of the running jobs together."""
        jobs = {job.request_id: job for job in self._running}
        passes = {name: runner.next_pass(job.seat, job.asked) for name, job in jobs.items() if job.asked is not None}
        candidates = [
            Candidate(name, job.arrival, *runner.size_of(job.seat, passes[name]), job.num_passes)
            for name, job in jobs.items()
        ]
        chosen = plan(candidates, num_rows=runner.num_rows, num_available=runner.num_available)
        for name in chosen.evict:
            runner.evict(jobs[name].seat)
        results = runner.run([(jobs[name].seat, passes[name]) for name in chosen.run])
        for name, passed in zip(chosen.run, results, strict=True):
            job = jobs[name]
            job.num_passes += 1
            if isinstance(passed, Exception):
                self._end(runner, job, self._fault(job, passed))
            elif passes[name] is job.asked:  # otherwise it was of what had been evicted
                self._go_on(runner, job, passed)

    def _go_on(self, runner: Runner, job: _Job[Any], passed: Passed | None) -> None:
        """Hand a job what came of its pass, tell its events, and note the pass that it wants next.

        No exception leaves here.
        """
        assert job.steps is not None
        try:
            item = next(job.steps) if passed is None else job.steps.send(passed)
            while not isinstance(item, Pass):
                self._head += _head_work(item)
                job.post(item)
                item = next(job.steps)
            job.asked = item
        except StopIteration as end:
            self._head += _head_work(end.value)
            self._end(runner, job, end.value)
        except Exception as error:
            self._end(runner, job, self._fault(job, error))

    def _fault(self, job: _Job[Any], error: Exception) -> EngineError:
        logger.error("request %s failed: %s", job.request_id, origin(error))
        return EngineError("the engine failed on this request; it is safe to retry")

    def _end(self, runner: Runner, job: _Job[Any], last: object) -> None:
        """Tell the last of a job, whose place is free by then."""
        self._leave(runner, job)
        self._forget(job)
        job.post(last)
        job.post(_END)

    def _leave(self, runner: Runner, job: _Job[Any]) -> None:
        self._running.remove(job)
        runner.close(job.seat)
        job.steps = job.seat = job.asked = None

    def _forget(self, job: _Job[Any]) -> None:
        """Drop a job from the event loop's books."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            job.loop.call_soon_threadsafe(self._jobs.pop, job.request_id, None)


def _head_work(item: object) -> HeadWork:
    """Return what the head did in the pass that gave `item`."""
    if isinstance(item, Release):
        return item.head
    return item if isinstance(item, HeadWork) else HeadWork()


def _settle(loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[GuardedLM]", outcome: object) -> None:
    """Hand the outcome of loading to whoever still waits for it."""

    def settle() -> None:
        if ready.done():  # cancelled: the server is stopping
            return
        if isinstance(outcome, BaseException):
            ready.set_exception(outcome)
        else:
            ready.set_result(cast("GuardedLM", outcome))

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle)


def _warm_up(lm: GuardedLM, runner: Runner) -> None:
    """Run a short request, so that the first client does not pay for lazy initialisation.

    Raises:
        EngineError: if the safety head fails: a dead head must not serve.
    """
    mode = Mode.OFF if lm.config is None else Mode.SCORE
    prompt = lm.chat.encode([Message("user", "Hello")])
    request = GenerationRequest(prompt, max_tokens=4, sampling=GREEDY, input=mode, output=mode)
    seat, steps = runner.open(prompt, watches_request=mode is not Mode.OFF), Generation(lm, request, lm.schedule).run()
    try:
        item = next(steps)
        while True:
            if not isinstance(item, Pass):
                item = next(steps)
                continue
            (passed,) = runner.run([(seat, item)])
            if isinstance(passed, Exception):
                raise passed
            item = steps.send(passed)
    except StopIteration as end:
        if end.value.num_head_failures:
            raise EngineError("the safety head fails on a harmless request") from None
    finally:
        runner.close(seat)
