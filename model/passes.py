"""What a sequence asks of a forward pass, and the plain way to run it: one sequence alone.

A sequence says what it wants fed and assessed, and goes on with the answer; whoever drives it decides when the pass
runs, and beside which others. Here it runs at once; the server's engine runs the passes of many sequences together.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from model.attention import Span
from model.chat import EncodedPrompt
from model.guarded_lm import Assessed, GuardedLM
from model.safety_head import Passage

E = TypeVar("E")
R = TypeVar("R")


class Pass(NamedTuple):
    """One forward pass over new tokens of one sequence."""

    token_ids: Sequence[int]
    """The new tokens; none where the pass only assesses what was fed before."""
    num_query: int = 0
    """New tokens of the query whose states the token head reads; the response, if any, begins after them."""
    num_response: int = 0
    """New response tokens, the last ones, whose states the token head reads."""
    asks_request: bool = False
    """Assess the request, which ends in this pass."""
    num_asked: int = 0
    """Assess the newest this many response tokens by the token head, fed in this pass or before it."""
    spans: Sequence[Span] = ()
    """What `[CLS]` assesses."""
    restarts_at: int | None = None
    """First forget every token after the first this many, and what was read of the response."""


class Passed(NamedTuple):
    """What a pass gives; empty where it was not asked for, or there is no such signal."""

    logits: Tensor
    """Next-token logits after the newest token, (V,); of no use where no token was fed."""
    request: float | None = None
    """Logit of the request by the token head."""
    query: Sequence[float] = ()
    """Logits of the new tokens of the query, where the token head reads them one by one."""
    response: Sequence[float] = ()
    """Logits of the response by the token head."""
    cls_request: float | None = None
    """Logit of the request by `[CLS]`."""
    cls_response: Sequence[float] = ()
    """Logits of the response by `[CLS]`, one for each span that covers some of it."""
    seconds: float = 0.0
    """That the heads took, besides the pass."""
    likeliest: int | None = None
    """The first token of the highest logit; None where nobody has looked for it."""


Steps = Generator[Pass | E, Passed, R]
"""A sequence: it yields passes, and events for its caller, and ends with a result."""


def drive(steps: Steps[E, R], run: Callable[[Pass], Passed]) -> Iterator[E | R]:
    """Yield the events of a sequence, and at the end its result; passes run when the next event is asked for."""
    try:
        item = next(steps)
        while True:
            if isinstance(item, Pass):
                item = steps.send(run(item))
            else:
                yield item
                item = next(steps)
    except StopIteration as end:
        yield end.value


class Solo:
    """Runs the passes of one sequence, nothing else beside it.

    Args:
        lm: the model.
        prompt: what will be read first.
    """

    def __init__(self, lm: GuardedLM, prompt: EncodedPrompt) -> None:
        self._lm = lm
        self._cache = lm.new_cache(prompt)
        self._query = Passage()
        self._response = Passage()
        self._newest: Tensor | None = None  # what the head reads at the response tokens fed last, (N, 2 * S)

    def run(self, asked: Pass) -> Passed:
        """Run one pass."""
        lm = self._lm
        if asked.restarts_at is not None:
            lm.crop(self._cache, asked.restarts_at)
            self._response, self._newest = Passage(), None
        logits, of_query, of_tokens, copies = torch.empty(0), None, None, None
        if asked.token_ids or asked.spans:
            num_read = asked.num_query + asked.num_response
            output = lm.forward(asked.token_ids, self._cache, states_of_last=num_read, spans=asked.spans)
            logits, copies = output.logits, output.copies
            if output.states is not None and asked.num_query:
                of_tokens = output.states[: asked.num_query]
                of_query = self._query.extend_to_last(of_tokens)
            if output.states is not None and asked.num_response:
                self._newest = self._response.extend(output.states[asked.num_query :])
        found: list[Assessed] = []

        def of(assessed: Assessed) -> list[float]:
            found.append(assessed)
            return assessed.logits

        request = of(lm.assess("request", of_query))[0] if asked.asks_request and of_query is not None else None
        query = of(lm.assess_query(of_tokens)) if lm.reads_query and of_tokens is not None else []
        response: list[float] = []
        if asked.num_asked and self._newest is not None:
            response = of(lm.assess("response", self._newest[-asked.num_asked :]))
        cls_request, cls_response = None, []
        if copies is not None:
            is_first = asked.spans[0].covers == 0
            if is_first and asked.asks_request:
                (cls_request,) = of(lm.assess_cls("request", copies[:1]))
            if len(copies) > is_first:
                cls_response = of(lm.assess_cls("response", copies[is_first:]))
        seconds = sum(assessed.seconds for assessed in found)
        return Passed(logits, request, query, response, cls_request, cls_response, seconds)

    def drive(self, steps: Steps[E, R]) -> Iterator[E | R]:
        """Yield the events of a sequence, and at the end its result; passes run when the next event is asked for."""
        return drive(steps, self.run)

    def complete(self, steps: Generator[Pass, Passed, R]) -> R:
        """Return the result of steps that tell nothing on their way."""
        *_, result = self.drive(steps)
        return result
