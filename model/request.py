"""What is asked of the model, and the checks that keep a bad request out of it."""

from dataclasses import dataclass, field

from model.chat import EncodedPrompt
from model.errors import ContextLengthError, InvalidRequest
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.sampling import SamplingParams


@dataclass(frozen=True)
class GenerationRequest:
    """One response to generate."""

    prompt: EncodedPrompt
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    input: Mode = Mode.BLOCK
    output: Mode = Mode.BLOCK
    choice: int = 0
    """Index among the `n` choices of one call; each draws from its own generator."""
    cache_salt: str = ""
    """Keys and values of prompts that begin alike are shared only where it is equal."""


def admit(lm: GuardedLM, request: GenerationRequest) -> None:
    """Refuse a request that `generate` could not honour.

    Raises:
        InvalidRequest: empty prompt, token id outside the vocabulary, no token asked for, more asked
            for at least than at most, or a side scored by a model without a signal.
        ContextLengthError: prompt and `max_tokens` do not fit the context together.
    """
    check_prompt(lm, request.prompt)
    num_prompt = len(request.prompt.request) + len(request.prompt.prefill)
    if request.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {request.max_tokens}", param="max_tokens")
    if request.sampling.min_tokens > request.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {request.sampling.min_tokens}, but max_tokens is {request.max_tokens}", param="min_tokens"
        )
    if num_prompt + request.max_tokens > lm.context_length:
        raise ContextLengthError(
            f"the model's context is {lm.context_length} tokens, but the messages have {num_prompt} "
            f"and max_tokens asks for {request.max_tokens} more",
            param="messages" if num_prompt >= lm.context_length else "max_tokens",
        )
    if bad := [token for token in request.sampling.logit_bias if not 0 <= token < lm.vocab_size]:
        raise InvalidRequest(f"logit_bias names token {bad[0]}; ids are 0 to {lm.vocab_size - 1}", param="logit_bias")
    if lm.config is None and (request.input, request.output) != (Mode.OFF, Mode.OFF):
        raise InvalidRequest("this model carries no safety signal; both sides must be off", param="moderation")


def check_prompt(lm: GuardedLM, prompt: EncodedPrompt) -> None:
    """Refuse a prompt that the model cannot read at all.

    Raises:
        InvalidRequest: if the request is empty or holds an id outside the vocabulary.
        ContextLengthError: if it is longer than the context.
    """
    ids = (*prompt.request, *prompt.prefill)
    if not prompt.request:
        raise InvalidRequest("the messages are empty after tokenisation", param="messages")
    if len(ids) > lm.context_length:
        raise ContextLengthError(
            f"the model's context is {lm.context_length} tokens, but the messages have {len(ids)}", param="messages"
        )
    if bad := [token for token in ids if not 0 <= token < lm.vocab_size]:
        raise InvalidRequest(f"token id {bad[0]} is outside the vocabulary, 0 to {lm.vocab_size - 1}", param="messages")
