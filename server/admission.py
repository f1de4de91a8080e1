"""From a request body to what the engine is asked: names, modes, prompt, lengths, sampling."""

import asyncio
from collections.abc import Sequence

from model.chat import EncodedPrompt, Message
from model.errors import ContextLengthError
from model.guarded_lm import GuardedLM
from model.policy import Mode
from model.request import GenerationRequest
from model.sampling import SamplingParams
from server.auth import Access
from server.errors import invalid
from server.protocol.chat import ChatMessage, ChatRequest
from server.protocol.moderation import Moderation, SidePolicy
from server.service import Service

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "ignore_eos",
)
"""Fields that the body and `SamplingParams` call alike."""

_ROLES = {"developer": "system"}


async def admit(service: Service, lm: GuardedLM, access: Access, body: ChatRequest) -> list[GenerationRequest]:
    """Return one generation request per choice.

    Raises:
        ApiError, InvalidRequest, TemplateError: if the body asks for what cannot be done, naming the field.
    """
    service.require_model(body.model)
    side_modes = modes(service, access, body.moderation)
    num_choices = _num_choices(service, body)
    sampling = _sampling(body)
    if body.safety is not None and body.safety.trace and access.expose_risk != "full":
        raise invalid("safety.trace", "safety.trace is only for callers who may see exact risks", code="not_allowed")
    continue_final = _continue_final(body)
    prompt = await encode(lm, body.messages, continue_final=continue_final)
    max_tokens = _max_tokens(lm, prompt, body, service.engine.longest)
    if sampling.min_tokens > max_tokens:
        raise invalid("min_tokens", f"min_tokens {sampling.min_tokens} is over the {max_tokens} tokens of the answer")
    return [
        GenerationRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=tuple(body.stop or ()),
            input=side_modes[0],
            output=side_modes[1],
            choice=choice,
            cache_salt=body.cache_salt or "",
        )
        for choice in range(num_choices)
    ]


def modes(service: Service, access: Access, moderation: Moderation | None) -> tuple[Mode, Mode]:
    """Return the modes of the input and the output side.

    A side that the request leaves out keeps the server's mode. A weaker mode is for keys that may loosen.

    Raises:
        ApiError: 404 for another moderation model, 400 for a mode that the caller may not choose.
    """
    settings = service.settings
    if moderation is None:
        return settings.input_mode, settings.output_mode
    service.require_model(moderation.model, param="moderation.model", aliases=settings.moderation_aliases)
    policy = moderation.policy
    return (
        _mode("input", policy.input if policy else None, settings.input_mode, access),
        _mode("output", policy.output if policy else None, settings.output_mode, access),
    )


def _mode(side: str, asked: SidePolicy | None, own: Mode, access: Access) -> Mode:
    if asked is None:
        return own
    mode = Mode(asked.mode)
    if mode.strictness < own.strictness and not access.may_loosen:
        field = f"moderation.policy.{side}.mode"
        message = (
            f"{field} {mode.value!r} is weaker than this server's {own.value!r}, and this caller may not loosen it"
        )
        raise invalid(field, message, code="not_allowed")
    return mode


async def encode(lm: GuardedLM, messages: Sequence[ChatMessage], *, continue_final: bool) -> EncodedPrompt:
    """Return the ids of a conversation, worked out off the event loop: it may be long.

    Raises:
        ApiError: for a message without text.
        TemplateError: if the chat template refuses the conversation.
    """
    turns = [Message(_ROLES.get(one.role, one.role), _text(index, one)) for index, one in enumerate(messages)]
    return await asyncio.to_thread(lm.chat.encode, turns, continue_final=continue_final)


def _text(index: int, message: ChatMessage) -> str:
    if message.refusal is not None and message.role != "assistant":
        raise invalid(f"messages[{index}].refusal", f"messages[{index}].refusal belongs to assistant messages only")
    if message.text is None:
        field = f"messages[{index}].content"
        raise invalid(field, f"{field} is required", code="missing_required_parameter")
    return message.text


def _num_choices(service: Service, body: ChatRequest) -> int:
    num = body.n or 1
    most = service.settings.most_choices
    if num > most:
        raise invalid("n", f"n must be at most {most}, got {num}")
    return num


def _max_tokens(lm: GuardedLM, prompt: EncodedPrompt, body: ChatRequest, longest: int) -> int:
    """Return how many tokens the answer may have: as asked under either name, else what there is room for.

    That is what the context has left, or the engine's cache, which holds `longest` tokens of one sequence. A prompt
    that is too long for the cache is left to the engine to refuse.
    """
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = f"max_completion_tokens {new} and its old name max_tokens {old} must not differ"
        raise invalid("max_tokens", message)
    num_prompt = len(prompt.request) + len(prompt.prefill)
    room = lm.context_length - num_prompt
    if room < 1:
        raise ContextLengthError(
            f"the model's context is {lm.context_length} tokens, but the messages have {num_prompt}", param="messages"
        )
    asked = new if new is not None else old
    if asked is not None and asked > room:
        field = "max_tokens" if new is None else "max_completion_tokens"
        raise ContextLengthError(
            f"the model's context is {lm.context_length} tokens, but the messages have {num_prompt} "
            f"and {field} asks for {asked} more",
            param=field,
        )
    if asked is None and num_prompt >= longest:
        raise ContextLengthError(
            f"the server has room for {longest} tokens of a conversation, but the messages have {num_prompt}",
            param="messages",
        )
    return asked or min(room, longest - num_prompt)


def _sampling(body: ChatRequest) -> SamplingParams:
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options needs stream: true")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    top = (body.top_logprobs or 0) if body.logprobs else None
    return SamplingParams(**given, logit_bias=bias, top_logprobs=top)


def _continue_final(body: ChatRequest) -> bool:
    """Return whether the last message is a prefill, as vLLM spells it."""
    adds_prompt = body.add_generation_prompt is not False
    if not body.continue_final_message:
        if not adds_prompt:
            message = "add_generation_prompt: false is only supported with continue_final_message: true"
            raise invalid("add_generation_prompt", message, code="unsupported_parameter")
        return False
    if adds_prompt:
        raise invalid("continue_final_message", "continue_final_message needs add_generation_prompt: false")
    if body.messages[-1].role != "assistant":
        last = f"messages[{len(body.messages) - 1}].role"
        raise invalid(last, f"continue_final_message continues an assistant message; {last} is another")
    return True
