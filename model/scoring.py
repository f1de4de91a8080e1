"""Score a whole conversation, generating nothing."""

from collections.abc import Iterator

from model.chat import EncodedPrompt
from model.config import SafetyConfig
from model.errors import InvalidRequest
from model.events import HeadWork
from model.generation import chunks
from model.guarded_lm import GuardedLM
from model.passes import Solo, Steps
from model.reader import Reader
from model.request import check_prompt
from model.trace import Trace


def score(lm: GuardedLM, prompt: EncodedPrompt) -> Trace:
    """Return the request risk and the assessments of the response, one at every token.

    Args:
        lm: a model that carries a signal.
        prompt: the request, and the response as its `prefill`; without one only the request is scored.

    Raises:
        InvalidRequest: if the prompt cannot be read, or the model carries no signal.
    """
    *_, trace = score_in_passes(lm, prompt)
    assert isinstance(trace, Trace)
    return trace


def score_in_passes(lm: GuardedLM, prompt: EncodedPrompt) -> Iterator[HeadWork | Trace]:
    """Return what the head did in each forward pass, and at the end the trace that `score` returns.

    No pass reads more than `model.generation.PREFILL_CHUNK` tokens, so a caller can stop, or take turns,
    between passes.

    Raises:
        InvalidRequest: as `score`.
    """
    if lm.config is None:
        raise InvalidRequest("this model carries no safety signal", param="model")
    check_prompt(lm, prompt)
    return Solo(lm, prompt).drive(steps(lm, lm.config, prompt))


def steps(lm: GuardedLM, config: SafetyConfig, prompt: EncodedPrompt) -> Steps[HeadWork, Trace]:
    """Yield passes over a conversation and what the head did in each, and return the trace."""
    trace = Trace(config.smoothing)
    reader = Reader(lm, prompt, lm.schedule, watches_request=True, watches_response=True)
    for chunk in chunks((*prompt.request, *prompt.prefill)):
        step = yield from reader.feed(chunk, must_assess=True)
        if step.request is not None:
            trace.read_request(step.request)
        for position, logit in step.response:
            trace.add(position, logit)
        yield step.work
    return trace
