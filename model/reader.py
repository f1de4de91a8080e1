"""Feeds one sequence to the model and says what the signal finds: what generating and scoring have in common.

Where a checkpoint carries both, the logit of a token at which `[CLS]` was assessed is the mean of both, weighted by the
checkpoint's shares. Between assessments the newest `[CLS]` still counts, but only where it raises the risk: what it has
not read it cannot clear. So one trace, one threshold and one policy serve both.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from model.attention import Span, window
from model.chat import EncodedPrompt
from model.events import HeadWork
from model.guarded_lm import Assessed, GuardedLM, StepOutput
from model.safety_head import Passage
from model.schedule import Schedule, is_due

BEFORE = Span(0, range(0))
"""The assessment of the request alone."""


class Step(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor
    """Next-token logits of the newest token, (V,)."""
    request: float | None
    """Logit of the request, in the pass that ends it."""
    response: list[tuple[int, float]]
    """Each assessment of the response: how many of its tokens it covers, and its logit."""
    work: HeadWork


class Reader:
    """One sequence in the model, and the state of the signal over it.

    Args:
        lm: the model.
        prompt: its request is what is fed first.
        schedule: when `[CLS]` is assessed; without one, when the token head is.
        watches_request: assess the request.
        watches_response: assess the response.
    """

    def __init__(
        self,
        lm: GuardedLM,
        prompt: EncodedPrompt,
        schedule: Schedule,
        *,
        watches_request: bool,
        watches_response: bool,
    ) -> None:
        self._lm = lm
        self._schedule = schedule
        self._cache = lm.new_cache(prompt)
        self._num_request = len(prompt.request)
        self._watched_from = prompt.query_start if watches_request else self._num_request
        self._watches_request = watches_request
        self._watches_response = watches_response
        self._query = Passage()
        self._num_fed = 0
        self._is_refusal = False
        self._seconds = 0.0
        self._begin_response()

    def _begin_response(self) -> None:
        self._response = Passage()
        self._features: Tensor | None = None  # what the head reads at the response tokens fed last, (N, 2 * S)
        self._newest_due = 0
        self._held: float | None = None  # the newest response logit of `[CLS]`

    @property
    def length(self) -> int:
        """Response tokens that were fed."""
        return max(0, self._num_fed - self._num_request)

    def feed(self, token_ids: Sequence[int], *, turned_at: int | None = None, must_assess: bool = False) -> Step:
        """Feed new tokens, of the request, of the response or of both, and assess them where that is due.

        Several response tokens at once are given ones: each is assessed, whatever the schedule, `[CLS]` by rule R2.

        Args:
            token_ids: the new tokens, at least one.
            turned_at: response tokens before the first suspicious one of the current run; None where the newest
                assessment is clear. A run makes every schedule dense.
            must_assess: assess a single token too, whatever the schedule.
        """
        first, stop, border = self._num_fed, self._num_fed + len(token_ids), self._num_request
        ends_request = first < border <= stop
        numbers = range(max(first, border) - border + 1, stop - border + 1)  # of the response tokens
        asked = self._due(numbers, is_suspicious=turned_at is not None, must_assess=must_assess)
        num_query = max(0, min(stop, border) - max(first, self._watched_from))
        is_watched = num_query > 0 or (len(numbers) > 0 and self._watches_response)
        output = self._lm.forward(
            token_ids,
            self._cache,
            states_of_last=num_query + len(numbers) if is_watched else 0,
            spans=self._spans(asked, turned_at, is_first=ends_request),
        )
        self._num_fed = stop
        if output.states is not None and len(numbers):
            self._features = self._response.extend(output.states[num_query:])
        of_query = self._query.extend(output.states[:num_query]) if output.states is not None and num_query else None
        request = self._assess_request(of_query, output) if ends_request and self._watches_request else None
        has_both = self._lm.cls is not None and self._lm.head is not None
        response = self._assess_response(numbers if has_both and self._watches_response else asked, asked, output)
        return self._step(output.logits, request, response)

    def assess_newest(self, *, turned_at: int | None = None) -> Step:
        """Assess the newest response token, which was fed and not assessed, without feeding another.

        Never needed where there are both, as the token head has assessed every token.
        """
        number = self.length
        if self._lm.cls is None:
            assert self._features is not None
            output = StepOutput(self._features, None)
        else:
            output = self._lm.forward((), self._cache, spans=self._spans([number], turned_at))
        return self._step(output.logits, None, self._assess_response([number], [number], output))

    def begin_refusal(self, prefix: Sequence[int]) -> Tensor:
        """Forget the response, feed the refusal prefix after the bare request, and return the logits (V,).

        Everything that follows is assessed. `[CLS]` is assessed on the request first, so that nothing is left of the
        response in it. It then follows rule R1, where a token head watches the refusal; alone it must go on reading
        what is new.
        """
        self._lm.crop(self._cache, self._num_request)
        self._begin_response()
        self._is_refusal = self._watches_response = True
        self._num_fed = self._num_request + len(prefix)
        spans = self._spans([len(prefix)], None, is_first=True)
        output = self._lm.forward(prefix, self._cache, states_of_last=len(prefix), spans=spans)
        if output.states is not None:
            self._features = self._response.extend(output.states)
        if output.copies is not None:
            (self._held,) = self._timed(self._lm.assess_cls("response", output.copies[-1:]))
        return output.logits

    def _due(self, numbers: range, *, is_suspicious: bool, must_assess: bool) -> list[int]:
        """Return at which of the new response tokens the schedule asks for an assessment."""
        if not self._watches_response:
            return []
        if self._follows_r1:
            return [number for number in numbers if number <= self._lm.windows.r1]
        if len(numbers) > 1 or must_assess:
            found = list(numbers)
        else:
            found = [n for n in numbers if is_due(self._schedule, n, self._newest_due, is_suspicious=is_suspicious)]
        self._newest_due = found[-1] if found else self._newest_due
        return found

    @property
    def _follows_r1(self) -> bool:
        """Whether `[CLS]` reads the first tokens of a refusal, and the token head watches the others."""
        return self._is_refusal and self._lm.cls is not None and self._lm.head is not None

    def _spans(self, numbers: Sequence[int], turned_at: int | None, *, is_first: bool = False) -> list[Span]:
        """Return what `[CLS]` reads in this pass, if there is one."""
        if self._lm.cls is None:
            return []
        windows, is_r1 = self._lm.windows, self._follows_r1
        read = [window(number, windows, is_malicious=is_r1, turned_at=turned_at) for number in numbers]
        return [*([BEFORE] if is_first else []), *map(Span, numbers, read)]

    def _assess_request(self, features: Tensor | None, output: StepOutput) -> float:
        """Return the logit of the request from what the head and `[CLS]` read at its end."""
        token = cls = None
        if features is not None and self._lm.head is not None:
            (token,) = self._timed(self._lm.assess("request", features[-1:]))
        if output.copies is not None:
            (cls,) = self._timed(self._lm.assess_cls("request", output.copies[:1]))
        return combine(token, cls, self._lm.cls_config.request_share, is_fresh=True)

    def _assess_response(
        self, numbers: Sequence[int], fresh: Sequence[int], output: StepOutput
    ) -> list[tuple[int, float]]:
        """Return the logits of some new response tokens, `[CLS]` being `fresh` at some of them."""
        if not numbers:
            return []
        token: Sequence[float | None] = [None] * len(numbers)
        if self._features is not None and self._lm.head is not None:
            token = self._timed(self._lm.assess("response", self._features[-len(numbers) :]))
        cls: dict[int, float] = {}
        if output.copies is not None and fresh:
            logits = self._timed(self._lm.assess_cls("response", output.copies[-len(fresh) :]))
            cls = dict(zip(fresh, logits, strict=True))
        found = []
        for number, logit in zip(numbers, token, strict=True):
            self._held = cls.get(number, self._held)
            share = self._lm.cls_config.response_share
            found.append((number, combine(logit, self._held, share, is_fresh=number in cls)))
        return found

    def _timed(self, found: Assessed) -> list[float]:
        self._seconds += found.seconds
        return found.logits

    def _step(self, logits: Tensor, request: float | None, response: list[tuple[int, float]]) -> Step:
        found = [logit for _, logit in response] + ([request] if request is not None else [])
        seconds, self._seconds = self._seconds, 0.0
        return Step(logits, request, response, HeadWork.of(found, seconds))


def combine(token: float | None, cls: float | None, share: float, *, is_fresh: bool) -> float:
    """Return one logit of the token head's and of `[CLS]`'s, or the one that is there.

    Args:
        token: of the token head.
        cls: the newest one of `[CLS]`.
        share: weight of `[CLS]`; at 0 and at 1 the other has no say.
        is_fresh: `[CLS]` was assessed here; otherwise it may only raise the risk.
    """
    if token is None or cls is None:
        alone = token if cls is None else cls
        assert alone is not None
        return alone
    if share == 0.0:
        return token
    mean = cls if share == 1.0 else (1.0 - share) * token + share * cls
    return mean if is_fresh or not token > mean else token
