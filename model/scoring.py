"""Score a whole conversation, generating nothing."""

from collections.abc import Iterator

from model.chat import EncodedPrompt
from model.config import SafetyConfig
from model.errors import InvalidRequest
from model.events import HeadWork
from model.generation import chunks
from model.guarded_lm import GuardedLM
from model.request import check_prompt
from model.safety_head import Passage
from model.trace import Trace


def score(lm: GuardedLM, prompt: EncodedPrompt) -> Trace:
    """Return the request risk and an assessment at every response token.

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
    return _passes(lm, lm.config, prompt)


def _passes(lm: GuardedLM, config: SafetyConfig, prompt: EncodedPrompt) -> Iterator[HeadWork | Trace]:
    trace, cache = Trace(config.smoothing), lm.new_cache()
    query, response = Passage(), Passage()
    start, num_request = 0, len(prompt.request)
    for chunk in chunks((*prompt.request, *prompt.prefill)):
        end = start + len(chunk)
        first = max(start, prompt.query_start)  # the first token whose states are read
        output = lm.forward(chunk, cache, states_of_last=max(0, end - first))
        work = HeadWork()
        if output.states is not None:
            num_query = max(0, min(end, num_request) - first)
            of_query, of_response = output.states[:num_query], output.states[num_query:]
            if len(of_query):
                features = query.extend(of_query)
                if end >= num_request:
                    found = lm.assess("request", features[-1:])
                    trace.read_request(found.logits[0])
                    work += HeadWork.of(*found)
            if len(of_response):
                found = lm.assess("response", response.extend(of_response))
                for logit in found.logits:
                    trace.add(trace.position + 1, logit)
                work += HeadWork.of(*found)
        yield work
        start = end
    yield trace
