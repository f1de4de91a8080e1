"""Generate one response under a policy: the slow, plain loop, and the oracle for every faster engine.

Read `Generation.run` top to bottom. It computes nothing of the model: it yields the forward passes that it wants, and
whoever drives it runs them, here one sequence alone. The rules it applies are in `model.policy`; what may leave is
decided in `model.holdback`. A refusal continues from the request alone, without the text that it
interrupts (docs/adr/0001), so that it is written, and judged, without the harmful context.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from model.events import NO_WORK, Action, Event, Finish, FinishReason, HeadWork, Release
from model.guarded_lm import GuardedLM
from model.holdback import Holdback, ResponseToken
from model.passes import Pass, Passed, Solo, Steps
from model.policy import Continue, Decision, Mode, Policy, Refuse, Rollback
from model.reader import Reader, Step
from model.redraw import OPENING, Redraw
from model.request import GenerationRequest, admit
from model.sampling import GREEDY, draw, generator_for
from model.schedule import Schedule
from model.trace import Trace

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass, so that a long prompt does not hold up its neighbours."""
SHORTEST_REFUSAL = 24
"""Characters that the model adds to the refusal prefix before the end of a sentence ends the refusal."""


def generate(lm: GuardedLM, request: GenerationRequest, schedule: Schedule | None = None) -> Iterator[Event]:
    """Return the events of one response: any number of `Release`, then one `Finish`.

    One event comes after each forward pass, so a caller can stop, or take turns, between passes. Without a schedule
    the model's own decides when it is assessed.

    Raises:
        InvalidRequest: as `model.request.admit`.
    """
    admit(lm, request)
    return Solo(lm, request.prompt).drive(Generation(lm, request, schedule or lm.schedule).run())


class Generation:
    """The state of one response while it is generated."""

    def __init__(self, lm: GuardedLM, request: GenerationRequest, schedule: Schedule) -> None:
        self._lm = lm
        self._request = request
        self._policy = _policy(lm, request)
        self._reader = Reader(
            lm,
            request.prompt,
            schedule,
            watches_request=self._policy.input is not Mode.OFF,
            # What is read must be the same in all modes, and when it is read depends on what was found.
            watches_response=self._policy.output is not Mode.OFF or lm.reads_cls,
        )
        self._generator = generator_for(request.sampling, request.choice)
        self._prompt_ids = (*request.prompt.request, *request.prompt.prefill)
        self._num_prefill = len(request.prompt.prefill)
        self._draft = Holdback(lm.tokenizer, self._prompt_ids, request.stop, min_tokens=request.sampling.min_tokens)
        self._trace = Trace(smoothing=lm.config.smoothing if lm.config else 1.0)
        self._turned_at: int | None = None  # tokens before the first suspicious one of the current run
        self._response_risk: float | None = None
        self._request_head = NO_WORK
        self._response_head = NO_WORK
        self._untold_head = NO_WORK
        self._num_withdrawn = 0
        self._redraw: Redraw | None = None
        self._is_redrawn = False

    def run(self) -> Steps[Release, Finish]:
        """Yield passes and what they release, and return how the response ended."""
        step = yield from self._read_request()
        if isinstance(self._policy.decide_request(self._trace.request_risk), Refuse):
            return (yield from self._refuse("refused"))
        self._redraw = self._watched_for_refusal(step.logits)
        reason: FinishReason | None = None
        step, decision = yield from self._read_prefill(step)
        while isinstance(decision, Continue):
            is_held = reason is None and self._redraw is not None and self._redraw.may_come(self._draft.token_ids)
            yield self._release(0 if is_held else decision.releasable, is_end=reason is not None)
            if reason is not None:
                return self._finish(reason, "none", self._draft.num_released)
            reason, token_id = self._draw(step.logits, likeliest=step.likeliest)
            if self._redraw is not None and self._redraw.is_due(self._draft.token_ids):
                reason, token_id = self._draw_again(self._redraw)
            if reason is None:
                step, decision = yield from self._step(token_id)
            else:
                decision = yield from self._decide_last()
        assert isinstance(decision, Rollback)
        return (yield from self._roll_back(decision))

    @property
    def _length(self) -> int:
        """Response tokens that exist, a prefill's included."""
        return self._num_prefill + len(self._draft)

    def _read_request(self) -> Steps[Release, Step]:
        """Feed the request in chunks, note its risk at its end, and return its last step."""
        *before, last = chunks(self._request.prompt.request)
        for chunk in before:
            yield from self._reader.feed(chunk)
            yield Release()
        step = yield from self._reader.feed(last)
        self._request_head += step.work
        self._untold_head += step.work
        if step.request is not None:
            self._trace.read_request(step.request)
        yield Release(head=self._pop_head())
        return step

    def _read_prefill(self, step: Step) -> Steps[Release, tuple[Step, Decision]]:
        """Feed a prefilled assistant message and assess it, like generated text; return the newest step."""
        decision: Decision = Continue(releasable=0)
        for chunk in chunks(self._request.prompt.prefill):
            step = yield from self._reader.feed(chunk, must_assess=True)
            for position, logit in self._noted(step).response:
                self._add(position, logit)
                decision = self._policy.decide(self._trace, position)
                if isinstance(decision, Rollback):
                    return step, decision
            yield Release(head=self._pop_head())
        return step, decision

    def _watched_for_refusal(self, logits: Tensor) -> Redraw | None:
        """Return what watches for a refusal that would be drawn again; None where it would stand."""
        opening, bias = self._lm.refusal_ids[:OPENING], self._request.sampling.logit_bias
        if self._num_prefill or not self._policy.redraws(self._trace.request_risk):
            return None
        return Redraw(opening, logits) if len(opening) == OPENING and opening[0] not in bias else None

    def _draw_again(self, redraw: Redraw) -> tuple[FinishReason | None, int]:
        """Withdraw a refusal, and draw any other first token."""
        self._redraw, self._is_redrawn = None, True
        self._response_risk = self._overall_risk()
        self._num_withdrawn += self._draft.crop(0)
        self._trace, self._turned_at = replace(self._trace, assessments=[]), None
        self._reader.restart()
        return self._draw(redraw.logits, forbidden=redraw.opening[0])

    def _draw(
        self, logits: Tensor, *, likeliest: int | None = None, forbidden: int | None = None
    ) -> tuple[FinishReason | None, int]:
        """Draw the next token; return why the response ends with it, if it does."""
        sampling = self._request.sampling
        drawn = draw(
            logits,
            sampling,
            self._generator,
            prompt=self._prompt_ids,
            output=self._draft.token_ids,
            eos_ids=self._lm.eos_ids,
            forbidden=forbidden,
            likeliest=likeliest,
        )
        if drawn.token_id in self._lm.eos_ids and not sampling.ignore_eos:
            return "stop", drawn.token_id
        self._draft.push(ResponseToken(drawn.token_id, drawn.logprob, drawn.top))
        if self._draft.has_stopped:
            return "stop", drawn.token_id
        return ("length" if len(self._draft) == self._request.max_tokens else None), drawn.token_id

    def _step(self, token_id: int, *, must_assess: bool = False) -> Generator[Pass, Passed, tuple[Step, Decision]]:
        """Feed the newest token, assess it where that is due, and decide."""
        feed = self._reader.feed([token_id], turned_at=self._turned_at, must_assess=must_assess)
        step = self._noted((yield from feed))
        for position, logit in step.response:
            self._add(position, logit)
        return step, self._policy.decide(self._trace, self._length)

    def _decide_last(self) -> Generator[Pass, Passed, Decision]:
        """Make the assessment that comes before every end of a response, and decide on it."""
        if self._policy.output is not Mode.OFF and self._trace.position < self._length:
            if self._reader.length < self._length:  # the newest token has not been fed
                yield from self._step(self._draft.token_ids[-1], must_assess=True)
            else:
                step = yield from self._reader.assess_newest(turned_at=self._turned_at)
                self._add(*self._noted(step).response[0])
        return self._policy.decide(self._trace, self._length, is_final=True)

    def _noted(self, step: Step) -> Step:
        """Return the step, having counted what the head did for the response."""
        if self._policy.output is not Mode.OFF:  # otherwise it only decides what `[CLS]` reads
            self._response_head += step.work
            self._untold_head += step.work
        return step

    def _roll_back(self, decision: Rollback) -> Steps[Release, Finish]:
        """Withdraw what is unsafe, release what is not, and refuse.

        An alarm that reaches into a prefilled message releases none of the model's text.
        """
        kept = max(0, decision.to - self._num_prefill)
        self._num_withdrawn += self._draft.crop(kept)
        yield self._release(decision.to, is_end=True)
        return (yield from self._refuse("rolled_back"))

    def _refuse(self, action: Action) -> Steps[Release, Finish]:
        """Force the refusal prefix after the bare request, let the model continue it, and finish.

        Greedy and capped; the request's sampling, stop strings and logit_bias do not apply. The
        refusal is assessed on its own; if it turns harmful, it ends with fixed text.
        """
        assert self._lm.config is not None
        wording = self._lm.config.refusal
        self._response_risk = self._overall_risk()
        prefix = self._lm.refusal_ids
        room = self._lm.context_length - len(self._request.prompt.request) - len(prefix)
        refusal = Holdback(self._lm.tokenizer, self._request.prompt.request, stop=("\n",))
        if room > 0:
            is_safe = yield from self._continue_refusal(refusal, prefix, min(room, wording.max_tokens))
        else:
            is_safe = False
            yield Release(wording.prefix, is_refusal=True)
        if not is_safe:
            yield Release(wording.ending, is_refusal=True)
        return self._finish("content_filter", action, self._draft.num_released + refusal.num_released)

    def _continue_refusal(self, refusal: Holdback, prefix: Sequence[int], budget: int) -> Steps[Release, bool]:
        """Write the refusal; return False if it turned harmful and was cut."""
        self._policy = replace(self._policy, output=Mode.BLOCK)
        self._trace = replace(self._trace, assessments=[])
        for token_id in prefix:
            refusal.push(ResponseToken(token_id))
        step = yield from self._reader.begin_refusal(prefix)
        text, tokens = refusal.release(len(refusal))
        yield Release(text, tokens, is_refusal=True)
        wording_length = len(refusal.text)
        sampling = replace(GREEDY, top_logprobs=self._request.sampling.top_logprobs)
        decision: Decision = Continue(releasable=len(refusal))
        for _ in range(budget):
            drawn = draw(step.logits, sampling, self._generator, likeliest=step.likeliest)
            if drawn.token_id in self._lm.eos_ids:
                break
            refusal.push(ResponseToken(drawn.token_id, drawn.logprob, drawn.top))
            step = self._noted((yield from self._reader.feed([drawn.token_id], must_assess=True)))
            self._trace.add(*step.response[0])
            if refusal.has_stopped or _is_complete(refusal.text, wording_length):
                break
            decision = self._policy.decide(self._trace, len(refusal))
            if not isinstance(decision, Continue):
                break
            text, tokens = refusal.release(max(refusal.num_released, decision.releasable))
            yield Release(text, tokens, is_refusal=True, head=self._pop_head())
        if isinstance(decision, Continue) and self._trace.assessments:
            decision = self._policy.decide(self._trace, len(refusal), is_final=True)
        self._response_risk = _highest(self._response_risk, self._trace.response_risk(self._policy.patience))
        is_safe = isinstance(decision, Continue)
        if not is_safe:
            self._num_withdrawn += refusal.crop(refusal.num_released)
        text, tokens = refusal.release(len(refusal), is_end=True)
        yield Release(text, tokens, is_refusal=True, head=self._pop_head())
        return is_safe

    def _add(self, position: int, logit: float) -> None:
        """Append an assessment to the trace and note its risk at its token."""
        assessment = self._trace.add(position, logit)
        if not self._policy.is_suspicious(assessment):
            self._turned_at = None
        elif self._turned_at is None:
            self._turned_at = position - 1
        if position > self._num_prefill and self._policy.output is not Mode.OFF:
            self._draft.set_risk(position - self._num_prefill - 1, assessment.risk)

    def _overall_risk(self) -> float | None:
        """Return the response risk so far, withdrawn tokens included; None where it is not watched."""
        if self._policy.output is Mode.OFF:
            return None
        return _highest(self._response_risk, self._trace.response_risk(self._policy.patience))

    def _release(self, length: int, *, is_end: bool = False) -> Release:
        """Release what may leave out of the first `length` response tokens."""
        text, tokens = self._draft.release(max(0, length - self._num_prefill), is_end=is_end)
        num_held = len(self._draft) - self._draft.num_released
        return Release(text, tokens, head=self._pop_head(), num_held=num_held)

    def _pop_head(self) -> HeadWork:
        work, self._untold_head = self._untold_head, NO_WORK
        return work

    def _finish(self, reason: FinishReason, action: Action, completion_tokens: int) -> Finish:
        is_refusal = action != "none"
        return Finish(
            reason=reason,
            action=action,
            request_risk=self._trace.request_risk,
            response_risk=self._response_risk if is_refusal else self._overall_risk(),
            num_assessments=self._request_head.num_assessments + self._response_head.num_assessments,
            num_withdrawn_tokens=self._num_withdrawn,
            is_redrawn=self._is_redrawn,
            num_request_failures=self._request_head.num_failures,
            num_response_failures=self._response_head.num_failures,
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=completion_tokens,
        )


def _policy(lm: GuardedLM, request: GenerationRequest) -> Policy:
    """Return the request's policy; a model without a signal can only have both sides off."""
    if lm.config is None:
        return Policy(input=Mode.OFF, output=Mode.OFF, request_block=1.0, response_block=1.0, onset=1.0)
    return lm.config.policy(request.input, request.output)


def _is_complete(text: str, wording_length: int) -> bool:
    """Tell whether a refusal has said a sentence of its own after the prefix."""
    return len(text) - wording_length >= SHORTEST_REFUSAL and text.endswith((".", "!", "?"))


def chunks(ids: Sequence[int]) -> list[Sequence[int]]:
    """Return `ids` in the pieces of at most `PREFILL_CHUNK` tokens that one forward pass reads."""
    return [ids[start : start + PREFILL_CHUNK] for start in range(0, len(ids), PREFILL_CHUNK)]


def _highest(*risks: float | None) -> float | None:
    return max((risk for risk in risks if risk is not None), default=None)
