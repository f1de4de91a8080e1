"""An engine that runs sequences in turn: the one thread that touches the model.

Running sequences take turns, one forward pass each, so a short request is not stuck behind a long
one; there is no batching. A fault in one sequence ends that sequence and no other.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from model.chat import EncodedPrompt, Message
from model.errors import origin
from model.events import Event, Finish, HeadWork, Release
from model.generation import generate
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.request import GenerationRequest, admit, check_prompt
from model.sampling import GREEDY
from model.scoring import score_in_passes
from model.trace import Trace
from server.engine.engine import EngineError, EngineState, EngineStats, Overloaded

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_S = 1
_END = object()
_LAST = (Finish, Trace, Exception)
"""What ends a job: its place is free before the event loop reads it."""


@dataclass(eq=False)
class _Job(Generic[T]):
    """One request on its way through the worker. Shared by both threads; each field has one writer."""

    request_id: str
    begin: Callable[[GuardedLM], Iterator[T]]
    loop: asyncio.AbstractEventLoop
    outbox: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    is_aborted: bool = False  # written by the event loop, read by the worker
    steps: Iterator[T] | None = None  # worker only

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


class SequentialEngine:
    """Generates in one background thread, sequences taking turns.

    Args:
        load: returns the model; called once, in the background thread.
        max_running: sequences that take turns; the others wait.
        max_waiting: requests that may wait; more are refused with `Overloaded`.
    """

    def __init__(self, load: Callable[[], GuardedLM], *, max_running: int = 8, max_waiting: int = 64) -> None:
        self._load = load
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._inbox: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._jobs: dict[str, _Job[Any]] = {}  # event loop only
        self._running: list[_Job[Any]] = []  # worker only, its length may be read
        self._waiting: list[_Job[Any]] = []  # worker only
        self._head = HeadWork()  # written by the worker, read by the event loop
        self._state = EngineState.STARTING
        self._lm: GuardedLM | None = None
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
        admit(self.lm, request)
        return _Items(self._queue(request_id, lambda lm: generate(lm, request)))

    def abort(self, request_id: str) -> None:
        """Forget a request before its next forward pass. Unknown ids are ignored."""
        if (job := self._jobs.get(request_id)) is not None:
            job.is_aborted = True
            job.outbox.put_nowait(EngineError("the request was aborted"))

    async def score(self, request_id: str, prompt: EncodedPrompt) -> Trace:
        """Return the trace of a conversation, generating nothing; see `Engine.score`."""
        check_prompt(self.lm, prompt)
        async for item in _Items(self._queue(request_id, lambda lm: score_in_passes(lm, prompt))):
            if isinstance(item, Trace):
                return item
        raise EngineError("the engine gave no trace")

    def stats(self) -> EngineStats:
        """Return what the engine is doing now, and did so far."""
        num_running = len(self._running)
        return EngineStats(num_running, max(0, len(self._jobs) - num_running), self._head)

    def _queue(self, request_id: str, begin: Callable[[GuardedLM], Iterator[T]]) -> _Job[T]:
        """Hand a job to the worker."""
        if self._state is not EngineState.READY:
            raise EngineError(f"the engine is {self._state.value}")
        if request_id in self._jobs:
            raise EngineError(f"request id {request_id} is in use")
        if len(self._jobs) >= self._max_running + self._max_waiting:
            raise Overloaded(f"{len(self._jobs)} requests are running or waiting", retry_after_s=RETRY_AFTER_S)
        job = _Job(request_id, begin, asyncio.get_running_loop())
        self._jobs[request_id] = job
        self._inbox.put(job)
        return job

    def _run(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[GuardedLM]") -> None:
        """Load, then serve until told to stop. The body of the background thread."""
        try:
            lm = self._load()
            _warm_up(lm)
        except BaseException as error:
            _settle(loop, ready, error)
            return
        _settle(loop, ready, lm)
        try:
            self._serve(lm)
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

    def _serve(self, lm: GuardedLM) -> None:
        """Give every running job its turns until told to stop."""
        while self._receive():
            for job in [job for job in self._waiting if job.is_aborted]:
                self._waiting.remove(job)
                self._forget(job)
            while self._waiting and len(self._running) < self._max_running:
                self._running.append(self._waiting.pop(0))
            for job in list(self._running):
                if not self._advance(lm, job):
                    self._running.remove(job)
                    job.steps = None  # frees its keys and values

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

    def _advance(self, lm: GuardedLM, job: _Job[Any]) -> bool:
        """Give a job one forward pass; return whether it goes on. No exception leaves here."""
        if job.is_aborted:
            self._forget(job)
            return False
        try:
            if job.steps is None:
                job.steps = job.begin(lm)
            item = next(job.steps, _END)
        except Exception as error:
            logger.error("request %s failed: %s", job.request_id, origin(error))
            item = EngineError("the engine failed on this request; it is safe to retry")
        self._head += _head_work(item)
        if item is not _END and not isinstance(item, _LAST):
            job.post(item)
            return True
        self._forget(job)
        job.post(item)
        job.post(_END)
        return False

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


def _warm_up(lm: GuardedLM) -> None:
    """Run a short request, so that the first client does not pay for lazy initialisation.

    Raises:
        EngineError: if the safety head fails: a dead head must not serve.
    """
    mode = Mode.OFF if lm.config is None else Mode.SCORE
    prompt = lm.chat.encode([Message("user", "Hello")])
    request = GenerationRequest(prompt, max_tokens=4, sampling=GREEDY, input=mode, output=mode)
    for event in generate(lm, request):
        if isinstance(event, Finish) and event.num_head_failures:
            raise EngineError("the safety head fails on a harmless request")
