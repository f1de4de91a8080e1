"""Score a whole conversation in one forward pass, generating nothing."""

from model.chat import EncodedPrompt
from model.errors import InvalidRequest
from model.guarded_lm import GuardedLM
from model.request import check_prompt
from model.trace import Trace, probability


def score(lm: GuardedLM, prompt: EncodedPrompt) -> Trace:
    """Return the request risk and an assessment at every response token.

    Args:
        lm: a model that carries a signal.
        prompt: the request, and the response as its `prefill`; without one only the request is scored.

    Raises:
        InvalidRequest: if the prompt cannot be read, or the model carries no signal.
    """
    if lm.config is None:
        raise InvalidRequest("this model carries no safety signal", param="model")
    check_prompt(lm, prompt)
    num_response = len(prompt.prefill)
    output = lm.forward([*prompt.request, *prompt.prefill], lm.new_cache(), assess_last=num_response + 1)
    assert output.head is not None
    trace = Trace(lm.config.smoothing, request_risk=probability(float(output.head.request[0])))
    for position, logit in enumerate(output.head.response[1:].tolist(), start=1):
        trace.add(position, logit)
    return trace
