"""What to feed and to assess next of one sequence, and what the signal says of it: generating and scoring alike.

Where a checkpoint carries both, the logit of a token at which `[CLS]` was assessed is the mean of both, weighted by the
checkpoint's shares. Between assessments the newest `[CLS]` still counts, but only where it raises the risk: what it has
not read it cannot clear. Where the token head reads every token of the query, the highest of what it finds there may
raise the risk of the request. So one trace, one threshold and one policy serve both.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

from torch import Tensor

from model.attention import Span, window
from model.chat import EncodedPrompt
from model.events import HeadWork
from model.guarded_lm import GuardedLM
from model.passes import Pass, Passed
from model.schedule import Schedule, is_due
from model.trace import Highest

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
    likeliest: int | None = None
    """As in `model.passes.Passed`."""


Reading = Generator[Pass, Passed, Step]
"""Asks for a pass and returns what came of it."""


class Reader:
    """The state of the signal over one sequence.

    Args:
        lm: the model, of which nothing is computed here.
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
        self._has_both = lm.cls is not None and lm.head is not None
        self._schedule = schedule
        self._num_request = len(prompt.request)
        self._watched_from = prompt.query_start if watches_request else self._num_request
        self._watches_request = watches_request
        self._watches_response = watches_response
        self._num_fed = 0
        self._highest = Highest(lm.config.smoothing if lm.config is not None else 1.0)
        self._is_refusal = False
        self._restarts = False
        self._newest_due = 0
        self._held: float | None = None  # the newest response logit of `[CLS]`

    @property
    def length(self) -> int:
        """Response tokens that were fed."""
        return max(0, self._num_fed - self._num_request)

    def feed(self, token_ids: Sequence[int], *, turned_at: int | None = None, must_assess: bool = False) -> Reading:
        """Feed new tokens, of the request, of the response or of both, and assess them where that is due.

        Several response tokens at once are given ones: each is assessed, whatever the schedule, `[CLS]` by rule R2.
        Where the token head alone decides on responses, `[CLS]` keeps to the schedule, also where a response is
        suspicious: denser than that it reads only what is generated.

        Args:
            token_ids: the new tokens, at least one.
            turned_at: response tokens before the first suspicious one of the current run; None where the newest
                assessment is clear. A run makes every schedule dense.
            must_assess: assess a single token too, whatever the schedule; not `[CLS]` where it has no say.
        """
        first, stop, border = self._num_fed, self._num_fed + len(token_ids), self._num_request
        ends_request = first < border <= stop
        restarts_at, self._restarts = border if self._restarts else None, False
        numbers = range(max(first, border) - border + 1, stop - border + 1)  # of the response tokens
        asked = self._due(numbers, is_suspicious=turned_at is not None, must_assess=must_assess)
        reported = numbers if self._has_both and self._watches_response else asked
        asks_request = ends_request and self._watches_request
        passed = yield Pass(
            token_ids,
            num_query=max(0, min(stop, border) - max(first, self._watched_from)),
            num_response=len(numbers) if self._watches_response else 0,
            asks_request=asks_request,
            num_asked=len(reported) if self._lm.head is not None else 0,
            spans=self._spans(asked, turned_at, is_first=ends_request or restarts_at is not None),
            restarts_at=restarts_at,
        )
        self._num_fed = stop
        request = None
        self._highest.add(passed.query)
        if asks_request:
            share = self._lm.cls_config.request_share
            self._highest.raise_to(combine(passed.request, passed.cls_request, share, is_fresh=True))
            request = self._highest.logit
        return self._step(passed, request, self._assessed(reported, asked, passed))

    def assess_newest(self, *, turned_at: int | None = None) -> Reading:
        """Assess the newest response token, which was fed and not assessed, without feeding another.

        Never needed where there are both, as the token head has assessed every token.
        """
        number = self.length
        has_head = self._lm.head is not None
        passed = yield Pass((), num_asked=int(has_head), spans=self._spans([number], turned_at))
        return self._step(passed, None, self._assessed([number], [number], passed))

    def restart(self) -> None:
        """Forget the response: what is fed next is its first token. `[CLS]` is assessed on the request again before."""
        self._newest_due, self._held, self._restarts = 0, None, True
        self._num_fed = self._num_request

    def begin_refusal(self, prefix: Sequence[int]) -> Reading:
        """Forget the response, and feed the refusal prefix after the bare request.

        Everything that follows is assessed. `[CLS]` is assessed on the request first, so that nothing is left of the
        response in it. It then follows rule R1, where a token head watches the refusal; alone it must go on reading
        what is new.
        """
        self._newest_due, self._held = 0, None
        self._is_refusal = self._watches_response = True
        spans = self._spans([len(prefix)], None, is_first=True)
        passed = yield Pass(prefix, num_response=len(prefix), spans=spans, restarts_at=self._num_request)
        self._num_fed = self._num_request + len(prefix)
        if passed.cls_response:
            self._held = passed.cls_response[-1]
        return self._step(passed, None, [])

    def _due(self, numbers: range, *, is_suspicious: bool, must_assess: bool) -> list[int]:
        """Return at which of the new response tokens the schedule asks for an assessment."""
        if not self._watches_response:
            return []
        if self._follows_r1:
            return [number for number in numbers if number <= self._lm.windows.r1]
        asks_all = self._decides and (len(numbers) > 1 or must_assess)
        found = []
        for number in numbers:
            if asks_all or is_due(self._schedule, number, self._newest_due, is_suspicious=is_suspicious):
                found.append(number)
                self._newest_due = number
        return found

    @property
    def _decides(self) -> bool:
        """Whether what is assessed by schedule has a say on the response, and is not only read by later tokens."""
        return not self._has_both or self._lm.cls_config.response_share > 0.0

    @property
    def _follows_r1(self) -> bool:
        """Whether `[CLS]` reads the first tokens of a refusal, and the token head watches the others."""
        return self._is_refusal and self._has_both

    def _spans(self, numbers: Sequence[int], turned_at: int | None, *, is_first: bool = False) -> list[Span]:
        """Return what `[CLS]` reads in this pass, if there is one."""
        if self._lm.cls is None:
            return []
        windows, is_r1 = self._lm.windows, self._follows_r1
        read = [window(number, windows, is_malicious=is_r1, turned_at=turned_at) for number in numbers]
        return [*([BEFORE] if is_first else []), *map(Span, numbers, read)]

    def _assessed(self, numbers: Sequence[int], fresh: Sequence[int], passed: Passed) -> list[tuple[int, float]]:
        """Return the logits of some new response tokens, `[CLS]` being `fresh` at some of them."""
        token: Sequence[float | None] = passed.response or [None] * len(numbers)
        cls = dict(zip(fresh, passed.cls_response, strict=True)) if passed.cls_response else {}
        found = []
        for number, logit in zip(numbers, token, strict=True):
            self._held = cls.get(number, self._held)
            share = self._lm.cls_config.response_share
            found.append((number, combine(logit, self._held, share, is_fresh=number in cls)))
        return found

    def _step(self, passed: Passed, request: float | None, response: list[tuple[int, float]]) -> Step:
        found = [logit for _, logit in response] + ([request] if request is not None else [])
        return Step(passed.logits, request, response, HeadWork.of(found, passed.seconds), passed.likeliest)


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
