"""Generate one response under a policy: the slow, plain loop, and the oracle for every faster engine.

Read `Generation.run` top to bottom. The rules it applies are in `model.policy`; what may leave is
decided in `model.holdback`. A refusal continues from the request alone, without the text that it
interrupts (docs/adr/0001), so that it is written, and judged, without the harmful context.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from model.events import Action, Event, Finish, FinishReason, HeadWork, Release
from model.guarded_lm import Assessed, GuardedLM
from model.holdback import Holdback, ResponseToken
from model.policy import Continue, Decision, Mode, Policy, Refuse, Rollback
from model.request import GenerationRequest, admit
from model.safety_head import Passage
from model.sampling import GREEDY, draw, generator_for
from model.schedule import Every, Schedule, is_due
from model.trace import Trace

PREFILL_CHUNK = 512
"""Prompt tokens per forward pass, so that a long prompt does not hold up its neighbours."""
SHORTEST_REFUSAL = 24
"""Characters that the model adds to the refusal prefix before the end of a sentence ends the refusal."""


def generate(lm: GuardedLM, request: GenerationRequest, schedule: Schedule | None = None) -> Iterator[Event]:
    """Return the events of one response: any number of `Release`, then one `Finish`.

    One event comes after each forward pass, so a caller can stop, or take turns, between passes.

    Raises:
        InvalidRequest: as `model.request.admit`.
    """
    admit(lm, request)
    return Generation(lm, request, schedule or Every()).run()


class Generation:
    """The state of one response while it is generated."""

    def __init__(self, lm: GuardedLM, request: GenerationRequest, schedule: Schedule) -> None:
        self._lm = lm
        self._request = request
        self._schedule = schedule
        self._policy = _policy(lm, request)
        self._cache = lm.new_cache()
        self._generator = generator_for(request.sampling, request.choice)
        self._prompt_ids = (*request.prompt.request, *request.prompt.prefill)
        self._num_prefill = len(request.prompt.prefill)
        self._draft = Holdback(lm.tokenizer, self._prompt_ids, request.stop, min_tokens=request.sampling.min_tokens)
        self._response = Passage()
        self._features: Tensor  # what the head reads at the tokens fed last, (N, 2 * S)
        self._trace = Trace(smoothing=lm.config.smoothing if lm.config else 1.0)
        self._response_risk: float | None = None
        self._request_head = HeadWork()
        self._response_head = HeadWork()
        self._untold_head = HeadWork()
        self._num_withdrawn = 0

    def run(self) -> Iterator[Event]:
        """Yield the events of the response."""
        logits = yield from self._read_request()
        if isinstance(self._policy.decide_request(self._trace.request_risk), Refuse):
            yield from self._refuse("refused")
            return
        reason: FinishReason | None = None
        logits, decision = yield from self._read_prefill(logits)
        while isinstance(decision, Continue):
            yield self._release(decision.releasable, is_end=reason is not None)
            if reason is not None:
                yield self._finish(reason, "none", self._draft.num_released)
                return
            reason, token_id = self._draw(logits)
            if reason is None:
                logits, decision = self._step(token_id)
            else:
                decision = self._decide_last()
        assert isinstance(decision, Rollback)
        yield from self._roll_back(decision)

    @property
    def _length(self) -> int:
        """Response tokens that exist, a prefill's included."""
        return self._num_prefill + len(self._draft)

    def _read_request(self) -> Generator[Event, None, Tensor]:
        """Feed the request in chunks, note its risk at the last token, and return the logits (V,)."""
        prompt, query = self._request.prompt, Passage()
        num_query = len(prompt.request) - prompt.query_start if self._policy.input is not Mode.OFF else 0
        num_after = len(prompt.request)
        *before, last = chunks(prompt.request)
        for chunk in before:
            num_after -= len(chunk)
            self._feed(chunk, query, min(len(chunk), max(0, num_query - num_after)))
            yield Release()
        logits = self._feed(last, query, min(len(last), num_query))
        if num_query:
            found = self._lm.assess("request", self._features[-1:])
            self._request_head += self._note(found)
            self._trace.read_request(found.logits[0])
        yield Release(head=self._pop_head())
        return logits

    def _read_prefill(self, logits: Tensor) -> Generator[Event, None, tuple[Tensor, Decision]]:
        """Feed a prefilled assistant message and assess it token by token, like generated text."""
        decision: Decision = Continue(releasable=0)
        for chunk in chunks(self._request.prompt.prefill):
            logits = self._feed_response(chunk)
            for logit in self._response_logits() if self._policy.output is not Mode.OFF else ():
                self._add(self._trace.position + 1, logit)
                decision = self._policy.decide(self._trace, self._trace.position)
                if isinstance(decision, Rollback):
                    return logits, decision
            yield Release(head=self._pop_head())
        return logits, decision

    def _draw(self, logits: Tensor) -> tuple[FinishReason | None, int]:
        """Draw the next token; return why the response ends with it, if it does."""
        sampling = self._request.sampling
        drawn = draw(
            logits,
            sampling,
            self._generator,
            prompt=self._prompt_ids,
            output=self._draft.token_ids,
            eos_ids=self._lm.eos_ids,
        )
        if drawn.token_id in self._lm.eos_ids and not sampling.ignore_eos:
            return "stop", drawn.token_id
        self._draft.push(ResponseToken(drawn.token_id, drawn.logprob, drawn.top))
        if self._draft.has_stopped:
            return "stop", drawn.token_id
        return ("length" if len(self._draft) == self._request.max_tokens else None), drawn.token_id

    def _step(self, token_id: int) -> tuple[Tensor, Decision]:
        """Feed the newest token, assess it where the schedule asks for it, and decide."""
        is_suspicious = self._policy.num_trailing_suspicious(self._trace) > 0
        is_assessed = self._policy.output is not Mode.OFF and is_due(
            self._schedule, self._length, self._trace.position, is_suspicious=is_suspicious
        )
        logits = self._feed_response([token_id])
        if is_assessed:
            self._assess_newest()
        return logits, self._policy.decide(self._trace, self._length)

    def _feed_response(self, token_ids: Sequence[int]) -> Tensor:
        """Feed response tokens, note what the head would read at them, and return the logits (V,)."""
        return self._feed(token_ids, self._response, len(token_ids) if self._policy.output is not Mode.OFF else 0)

    def _feed(self, token_ids: Sequence[int], passage: Passage, num_read: int) -> Tensor:
        """Feed tokens, the last `num_read` of which continue `passage`, and return the logits (V,)."""
        output = self._lm.forward(token_ids, self._cache, states_of_last=num_read)
        if output.states is not None:
            self._features = passage.extend(output.states)
        return output.logits

    def _decide_last(self) -> Decision:
        """Make the assessment that comes before every end of a response, and decide on it."""
        if self._policy.output is not Mode.OFF and self._trace.position < self._length:
            if len(self._response) < self._length:  # the newest token has not been fed
                self._feed_response(self._draft.token_ids[-1:])
            self._assess_newest()
        return self._policy.decide(self._trace, self._length, is_final=True)

    def _roll_back(self, decision: Rollback) -> Iterator[Event]:
        """Withdraw what is unsafe, release what is not, and refuse.

        An alarm that reaches into a prefilled message releases none of the model's text.
        """
        kept = max(0, decision.to - self._num_prefill)
        self._num_withdrawn += self._draft.crop(kept)
        yield self._release(decision.to, is_end=True)
        yield from self._refuse("rolled_back")

    def _refuse(self, action: Action) -> Iterator[Event]:
        """Force the refusal prefix after the bare request, let the model continue it, and finish.

        Greedy and capped; the request's sampling, stop strings and logit_bias do not apply. The
        refusal is assessed on its own; if it turns harmful, it ends with fixed text.
        """
        assert self._lm.config is not None
        wording = self._lm.config.refusal
        self._response_risk = self._overall_risk()
        prefix = self._lm.tokenizer.encode(wording.prefix, add_special_tokens=False)
        room = self._lm.context_length - len(self._request.prompt.request) - len(prefix)
        refusal = Holdback(self._lm.tokenizer, self._request.prompt.request, stop=("\n",))
        if room > 0:
            is_safe = yield from self._continue_refusal(refusal, prefix, min(room, wording.max_tokens))
        else:
            is_safe = False
            yield Release(wording.prefix, is_refusal=True)
        if not is_safe:
            yield Release(wording.ending, is_refusal=True)
        yield self._finish("content_filter", action, self._draft.num_released + refusal.num_released)

    def _continue_refusal(self, refusal: Holdback, prefix: Sequence[int], budget: int) -> Generator[Event, None, bool]:
        """Write the refusal; return False if it turned harmful and was cut."""
        self._lm.crop(self._cache, len(self._request.prompt.request))
        self._policy = replace(self._policy, output=Mode.BLOCK)
        self._trace = replace(self._trace, assessments=[])
        for token_id in prefix:
            refusal.push(ResponseToken(token_id))
        self._response = Passage()
        logits = self._feed_response(prefix)
        text, tokens = refusal.release(len(refusal))
        yield Release(text, tokens, is_refusal=True)
        wording_length = len(refusal.text)
        sampling = replace(GREEDY, top_logprobs=self._request.sampling.top_logprobs)
        decision: Decision = Continue(releasable=len(refusal))
        for _ in range(budget):
            drawn = draw(logits, sampling, self._generator)
            if drawn.token_id in self._lm.eos_ids:
                break
            refusal.push(ResponseToken(drawn.token_id, drawn.logprob, drawn.top))
            logits = self._feed_response([drawn.token_id])
            (logit,) = self._response_logits()
            self._trace.add(len(refusal), logit)
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

    def _response_logits(self) -> list[float]:
        """Return the response's logits at the tokens fed last, counting what the head did."""
        found = self._lm.assess("response", self._features)
        self._response_head += self._note(found)
        return found.logits

    def _note(self, found: Assessed) -> HeadWork:
        """Return the head's work, and keep it for the next event."""
        work = HeadWork.of(*found)
        self._untold_head += work
        return work

    def _assess_newest(self) -> None:
        (logit,) = self._response_logits()
        self._add(self._length, logit)

    def _add(self, position: int, logit: float) -> None:
        """Append an assessment to the trace and note its risk at its token."""
        assessment = self._trace.add(position, logit)
        if position > self._num_prefill:
            self._draft.set_risk(position - self._num_prefill - 1, assessment.risk)

    def _overall_risk(self) -> float | None:
        return self._trace.response_risk(self._policy.patience)

    def _release(self, length: int, *, is_end: bool = False) -> Release:
        """Release what may leave out of the first `length` response tokens."""
        text, tokens = self._draft.release(max(0, length - self._num_prefill), is_end=is_end)
        return Release(text, tokens, head=self._pop_head())

    def _pop_head(self) -> HeadWork:
        work, self._untold_head = self._untold_head, HeadWork()
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
