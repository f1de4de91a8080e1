"""Score a whole conversation, generating nothing."""

from collections.abc import Iterator

from model.chat import EncodedPrompt
from model.config import SafetyConfig
from model.errors import InvalidRequest
from model.events import HeadWork
from model.generation import chunks
from model.guarded_lm import GuardedLM
from model.request import check_prompt
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
    end = -len(prompt.request)  # response tokens read so far; the request's last token is number 0
    for chunk in chunks((*prompt.request, *prompt.prefill)):
        end += len(chunk)
        num_assessed = min(len(chunk), max(0, end + 1))
        output = lm.forward(chunk, cache, assess_last=num_assessed)
        read: list[float] = []
        if output.head is not None:
            both = zip(output.head.request.tolist(), output.head.response.tolist(), strict=True)
            for position, (request, response) in enumerate(both, start=end - num_assessed + 1):
                if position == 0:
                    trace.read_request(request)
                else:
                    trace.add(position, response)
                read.append(response if position else request)
        yield HeadWork.of(read, output.head_s)
    yield trace
