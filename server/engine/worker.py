"""The one thread that touches the model.

Step by step it asks every running job which forward pass it wants next, lets the scheduler choose among them, has the
runner run those together, and hands each job what came of its own. A fault in one job ends that job and no other; after
a fault of the worker itself the running jobs end, and it goes on with the next.
"""

import logging
import queue
from itertools import count
from typing import Any

from model.chat import Message
from model.errors import origin
from model.events import Finish, HeadWork, Release
from model.generation import Generation
from model.guarded_lm import GuardedLM
from model.passes import Pass, Passed, drive
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import GREEDY
from server.engine.engine import EngineError
from server.engine.jobs import Job, Mail
from server.engine.scheduler import Candidate, Pace, plan
from server.engine.seats import Runner, run_one

logger = logging.getLogger(__name__)

MOST_FAULTS = 3
"""Faults of the worker, with no step between them in which a pass succeeded, after which it does not go on."""
MOST_BARREN = 3
"""Steps one after another of which every pass failed, after which the worker sees whether it can still answer."""


class Worker:
    """Runs jobs.

    Args:
        lm: the model.
        runner: runs the passes of its sequences.
        inbox: jobs that arrive, and None to stop.
        mail: takes what jobs are told.
        max_running: jobs that run at a time; the others wait.
    """

    def __init__(
        self, lm: GuardedLM, runner: Runner, inbox: "queue.SimpleQueue[Job[Any] | None]", mail: Mail, max_running: int
    ) -> None:
        self.lm = lm
        self.runner = runner
        self._inbox = inbox
        self._mail = mail
        self._max_running = min(max_running, runner.most_running or max_running)
        self._arrivals = count()
        self._waiting: list[Job[Any]] = []
        self._running: list[Job[Any]] = []
        self._pace = Pace()
        self._num_faults = 0
        self._num_barren = 0
        self.head = HeadWork()
        """All that the heads did so far. This and what follows is read by the event loop."""
        self.num_restarts = 0
        """Faults after which it went on."""
        self.num_evictions = 0
        """Sequences whose pages went to others, and which had to be computed again."""

    @property
    def num_running(self) -> int:
        """Jobs that run."""
        return len(self._running)

    def warm_up(self) -> None:
        """Run a short request, so that the first client does not pay for lazy initialisation.

        Raises:
            EngineError: if the safety head fails: a dead head must not serve.
        """
        mode = Mode.OFF if self.lm.config is None else Mode.SCORE
        prompt = self.lm.chat.encode([Message("user", "Hello")])
        request = GenerationRequest(prompt, max_tokens=4, sampling=GREEDY, input=mode, output=mode)
        steps = Generation(self.lm, request, self.lm.schedule).run()
        seat = self.runner.open(prompt, watches_request=mode is not Mode.OFF)
        try:
            *_, finish = drive(steps, lambda asked: run_one(self.runner, seat, asked))
        finally:
            self.runner.close(seat)
        assert isinstance(finish, Finish)
        if finish.num_head_failures:
            raise EngineError("the safety head fails on a harmless request")

    def serve(self) -> None:
        """Run jobs until told to stop, through faults, as long as it gets a step further between them."""
        while True:
            try:
                while self._receive():
                    try:
                        self._turn()
                    finally:
                        self._mail.send()
                return
            except Exception as error:
                self._num_faults += 1
                if self._num_faults >= MOST_FAULTS:
                    raise
                logger.critical("the engine failed, and goes on without its running requests: %s", origin(error))
                self._start_again()

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

    def _turn(self) -> None:
        """Drop what nobody waits for, begin what there is room for, and make a step."""
        dropped = [job for job in (*self._waiting, *self._running) if job.is_aborted]
        for job in dropped:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._leave(job)
            self._mail.end(job)
        if dropped:
            self._mail.send()  # the step takes its time, and others may have their place now
        while self._waiting and len(self._running) < self._max_running:
            self._begin(self._waiting.pop(0))
        if self._running:
            if self._step():
                self._num_faults = self._num_barren = 0
            else:
                self._doubt()

    def _begin(self, job: Job[Any]) -> None:
        """Let a job run: it has a seat, and says which pass it wants first."""
        try:
            job.arrival, job.steps = next(self._arrivals), job.begin(self.lm)
            job.seat = self.runner.open(job.prompt, salt=job.salt, watches_request=job.watches_request)
        except Exception as error:
            self._tell_fault(job, error)
            return
        self._running.append(job)
        self._go_on(job, None)

    def _doubt(self) -> None:
        """Fail where no pass succeeds any more. What fails in a request of its own leaves the warm-up alone.

        The warm-up needs pages too. Those that run give theirs up for it, and compute them again.

        Raises:
            Exception: of the warm-up, which is a fault of the worker's own.
        """
        self._num_barren += 1
        if self._num_barren >= MOST_BARREN:
            self._num_barren = 0
            for job in self._running:
                self.runner.evict(job.seat)
                job.num_passes = 0
            self.warm_up()
            self._num_faults = 0

    def _step(self) -> bool:
        """Run one pass of some of the running jobs together; tell whether any succeeded."""
        jobs = {job.request_id: job for job in self._running}
        passes = {name: self.runner.next_pass(job.seat, job.asked) for name, job in jobs.items() if job.asked}
        candidates = [
            Candidate(name, job.arrival, self.runner.size_of(job.seat, passes[name]), job.num_passes)
            for name, job in jobs.items()
        ]
        num_available = self.runner.num_available
        in_turn = self._pace.choose(candidates, num_available=num_available)
        chosen = plan(in_turn, num_rows=self.runner.num_rows, num_available=num_available)
        for name in chosen.evict:
            self.runner.evict(jobs[name].seat)
            jobs[name].num_passes = 0  # it begins again, and is not behind those that have only begun
            self.num_evictions += 1
        results = self.runner.run([(jobs[name].seat, passes[name]) for name in chosen.run])
        for name, passed in zip(chosen.run, results, strict=True):
            job = jobs[name]
            job.num_passes += 1
            if isinstance(passed, Exception):
                self._fail(job, passed)
            elif passes[name] is job.asked:  # otherwise it was of what had been evicted
                self._go_on(job, passed)
        return not all(isinstance(passed, Exception) for passed in results)

    def _go_on(self, job: Job[Any], passed: Passed | None) -> None:
        """Hand a job what came of its pass, tell its events, and note the pass that it wants next."""
        assert job.steps is not None
        try:
            item = next(job.steps) if passed is None else job.steps.send(passed)
            while not isinstance(item, Pass):
                self.head += _head_work(item)
                self._mail.tell(job, item)
                item = next(job.steps)
            job.asked = item
        except StopIteration as end:
            self._leave(job)
            self._mail.end(job, end.value)
        except Exception as error:
            self._fail(job, error)

    def _fail(self, job: Job[Any], error: Exception) -> None:
        self._leave(job)
        self._tell_fault(job, error)

    def _tell_fault(self, job: Job[Any], error: Exception) -> None:
        logger.error("request %s failed: %s", job.request_id, origin(error))
        self._mail.end(job, EngineError("the engine failed on this request; it is safe to retry"))

    def _leave(self, job: Job[Any]) -> None:
        self._running.remove(job)
        self.runner.close(job.seat)
        job.steps = job.seat = job.asked = None

    def _start_again(self) -> None:
        """Forget the running jobs, whatever state they are in, and all keys and values."""
        for job in self._running:
            job.steps = job.seat = job.asked = None
            self._mail.end(job, EngineError("the engine failed and has started again; it is safe to retry"))
        self._mail.send()
        self._running.clear()
        self.runner.reset()
        self.num_restarts += 1


def _head_work(item: object) -> HeadWork:
    """Return what the head did in the pass that gave `item`."""
    if isinstance(item, Release):
        return item.head
    return item if isinstance(item, HeadWork) else HeadWork()
