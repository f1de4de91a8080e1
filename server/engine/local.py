"""The engine of this process: requests in, events out, one background thread for the model."""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, cast

from model.chat import EncodedPrompt
from model.errors import ContextLengthError, InvalidRequest, origin
from model.events import Event, HeadWork
from model.generation import Generation
from model.guarded_lm import GuardedLM
from model.passes import Steps
from model.policy import Mode
from model.request import GenerationRequest, admit, check_prompt
from model.scoring import steps as scoring
from model.trace import Trace
from server.engine.engine import EngineError, EngineState, EngineStats, Overloaded
from server.engine.jobs import Items, Job, Mail
from server.engine.seats import Runner, Solos
from server.engine.worker import Worker

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1


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
        self._inbox: queue.SimpleQueue[Job[Any] | None] = queue.SimpleQueue()
        self._jobs: dict[str, Job[Any]] = {}
        self._state = EngineState.STARTING
        self._lm: GuardedLM | None = None
        self._worker: Worker | None = None
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
            EngineError: the safety head fails on a harmless request, or the cache is too small for any.
        """
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[Worker] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(loop, ready), name="ballast-engine", daemon=True)
        self._thread.start()
        self._worker = await ready
        self._lm = self._worker.lm
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

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation that there is room for; see `Engine.longest`."""
        assert self._worker is not None
        return self._worker.runner.longest

    def submit(self, request_id: str, request: GenerationRequest) -> Items[Event]:
        """Queue a request and return its events; see `Engine.submit`."""
        admit(self.lm, request)
        self._check_room(request.prompt, request.max_tokens)
        job = self._queue(
            request_id,
            request.prompt,
            lambda lm: Generation(lm, request, lm.schedule).run(),
            salt=request.cache_salt,
            watches_request=request.input is not Mode.OFF,
        )
        return Items(job)

    def abort(self, request_id: str) -> None:
        """Forget a request before its next forward pass. Unknown ids are ignored."""
        if (job := self._jobs.get(request_id)) is not None:
            job.is_aborted = True
            job.outbox.put_nowait(EngineError("the request was aborted"))

    async def score(self, request_id: str, prompt: EncodedPrompt, *, cache_salt: str = "") -> Trace:
        """Return the trace of a conversation, generating nothing; see `Engine.score`."""
        check_prompt(self.lm, prompt)
        if (config := self.lm.config) is None:
            raise InvalidRequest("this model carries no safety signal", param="model")
        self._check_room(prompt, 0)
        job = self._queue(request_id, prompt, lambda lm: scoring(lm, config, prompt), salt=cache_salt)
        async for item in Items(job):
            if isinstance(item, Trace):
                return item
        raise EngineError("the engine gave no trace")

    def stats(self) -> EngineStats:
        """Return what the engine is doing now, and did so far."""
        if (worker := self._worker) is None:
            return EngineStats(0, len(self._jobs), HeadWork())
        num_running = worker.num_running
        return EngineStats(
            num_running,
            max(0, len(self._jobs) - num_running),
            worker.head,
            num_restarts=worker.num_restarts,
            num_evictions=worker.num_evictions,
            cache_usage=worker.runner.usage,
        )

    def _check_room(self, prompt: EncodedPrompt, max_tokens: int) -> None:
        """Refuse what the cache could not hold even alone.

        Raises:
            ContextLengthError: saying how much it holds.
        """
        num_prompt = len(prompt.request) + len(prompt.prefill)
        if self._worker is not None and num_prompt + max_tokens > (room := self.longest):
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
        *,
        salt: str = "",
        watches_request: bool = True,
    ) -> Job[Any]:
        """Hand a job to the worker."""
        if self._state is not EngineState.READY:
            raise EngineError(f"the engine is {self._state.value}")
        if request_id in self._jobs:
            raise EngineError(f"request id {request_id} is in use")
        if len(self._jobs) >= self._max_running + self._max_waiting:
            raise Overloaded(f"{len(self._jobs)} requests are running or waiting", retry_after_s=RETRY_AFTER_S)
        job: Job[Any] = Job(
            request_id,
            prompt,
            begin,
            salt=salt,
            watches_request=watches_request,
        )
        self._jobs[request_id] = job
        self._inbox.put(job)
        return job

    def _run(self, loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[Worker]") -> None:
        """Load, then serve until told to stop. The body of the background thread."""
        try:
            lm = self._load()
            worker = Worker(lm, self._seat(lm), self._inbox, Mail(loop, self._forget), self._max_running)
            worker.warm_up()
        except BaseException as error:
            _settle(loop, ready, error)
            return
        _settle(loop, ready, worker)
        try:
            worker.serve()
        except BaseException as error:
            logger.critical("the engine's thread failed: %s", origin(error))
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._fail)

    def _forget(self, job: Job[Any]) -> None:
        self._jobs.pop(job.request_id, None)

    def _fail(self) -> None:
        """Stop taking requests and end all that wait for one; called when the worker is gone."""
        self._state = EngineState.STOPPED
        for job in self._jobs.values():
            job.outbox.put_nowait(EngineError("the engine has failed; the server must be restarted"))
        self._jobs.clear()


def _settle(loop: asyncio.AbstractEventLoop, ready: "asyncio.Future[Worker]", outcome: object) -> None:
    """Hand the outcome of loading to whoever still waits for it."""

    def settle() -> None:
        if ready.done():  # cancelled: the server is stopping
            return
        if isinstance(outcome, BaseException):
            ready.set_exception(outcome)
        else:
            ready.set_result(cast("Worker", outcome))

    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(settle)
