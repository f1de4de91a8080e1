"""Body of `/v1/chat/completions`: which fields are honoured, and which are refused."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.sampling import RANGES
from server.protocol.moderation import Moderation
from server.protocol.shared import MOST_ITEMS, RequestModel, Salt, Text, TextPart, at_most, num_entries


def _content_kind(value: Any) -> str:
    return "(parts)" if isinstance(value, list) else "(text)"


Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("(parts)")],
    Discriminator(_content_kind),
]
"""A string, or a list of text parts. Tags in parentheses are left out of a field's name in errors."""


MOST_BIASED_TOKENS = 1024
"""Entries of `logit_bias`: each costs time at every token, in the one thread that serves everybody."""
MOST_METADATA = 16
"""Entries of `metadata`, as in the OpenAI API."""
MOST_STOPS = 4
"""Stop strings of one request, as in the OpenAI API."""
LONGEST_STOP = 256
"""Characters of a stop string."""
LONGEST_TOKEN_ID = 9
"""Digits of a key of `logit_bias`; longer ones are no id of any vocabulary."""


class ChatMessage(RequestModel):
    """One turn of the conversation."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "name": (),
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "audio": (),
        "annotations": ([],),
        "reasoning_content": (),
    }

    role: Literal["system", "developer", "user", "assistant"]
    """Who speaks; `developer` is another name for `system`."""
    content: Content | None = None
    """The text, or text in parts; required but for an assistant's message with a `refusal`."""
    refusal: Text | None = None
    """An assistant's refusal, as an earlier response gave it."""

    @model_validator(mode="before")
    @classmethod
    def _name_other_roles(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") in ("tool", "function"):
            raise PydanticCustomError(
                "unsupported_parameter", "'{role}' is not supported", {"field": "role", "role": data["role"]}
            )
        return data

    @property
    def text(self) -> str | None:
        """The content with its parts joined; with a refusal, that too. None if there is neither."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        if self.refusal is None or (content and content.endswith(self.refusal)):
            return content
        return f"{content}\n\n{self.refusal}" if content else self.refusal


def _num_parts(messages: Any) -> int:
    contents = [one.get("content") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    return sum(len(content) for content in contents if isinstance(content, list))


Messages = Annotated[
    list[ChatMessage],
    Field(fail_fast=True, min_length=1, max_length=MOST_ITEMS),
    at_most(MOST_ITEMS, "parts", _num_parts),
]


class StreamOptions(RequestModel):
    """Options of a stream."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """Send one more chunk with the usage before the end."""


class SafetyOptions(RequestModel):
    """What the `safety` object of each choice reports."""

    trace: bool | None = None
    """Report the risk of every released token."""


def _token_ids(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) <= LONGEST_TOKEN_ID):
            raise PydanticCustomError("invalid_value", "must have token ids, as strings of digits, for keys")
    return bias


def _not_empty(stop: str) -> str:
    if not stop:
        raise PydanticCustomError("invalid_value", "must not be an empty string")
    if len(stop) > LONGEST_STOP:
        message = f"must have at most {LONGEST_STOP} characters, got {len(stop)}"
        raise PydanticCustomError("invalid_value", "{message}", {"message": message})
    return stop


def _as_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_value", "must be a string or a list of strings")
    return value


def _within(name: str) -> Any:
    """Say in the API's description what `SamplingParams` will hold a field to."""
    low, high = RANGES[name]
    return Field(json_schema_extra={"minimum": low, "maximum": high})


LogitBias = Annotated[float, Field(json_schema_extra={"minimum": -100, "maximum": 100})]
Stop = Annotated[
    list[Annotated[Text, AfterValidator(_not_empty)]],
    Field(max_length=MOST_STOPS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


class ChatRequest(RequestModel):
    """A chat completion request. Null means the default everywhere."""

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (False, True),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    model: str
    """Name of the served model, as `/v1/models` gives it."""
    messages: Messages
    """The conversation so far."""
    stream: bool | None = None
    """Send the answer as server-sent events while it is generated."""
    stream_options: StreamOptions | None = None
    """Only with `stream: true`."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Choices to generate, 1 unless given; at most the server's `max_n`, and what it can run and queue."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Old name of `max_completion_tokens`."""
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of the answer; unless given, what the model's context and the server's cache have room for."""
    min_tokens: Annotated[int, _within("min_tokens")] | None = None
    """Tokens before which the answer cannot end; 0 unless given."""
    temperature: Annotated[float, _within("temperature")] | None = None
    """1 unless given; 0 takes the most likely token each time."""
    top_p: Annotated[float, _within("top_p")] | None = None
    """Draw from the most likely tokens that together have this probability; 1, which is all, unless given."""
    top_k: Annotated[int, _within("top_k")] | None = None
    """Draw from this many of the most likely tokens; 0 or -1, which is all, unless given."""
    min_p: Annotated[float, _within("min_p")] | None = None
    """Draw from tokens of at least this share of the most likely one's probability; 0 unless given."""
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    """Taken from the logit of every token that the answer holds already; 0 unless given."""
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None
    """Taken from a token's logit as many times as the answer holds it; 0 unless given."""
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    """Over 1, tokens of the messages and the answer so far become less likely; 1 unless given."""
    logit_bias: (
        Annotated[dict[str, LogitBias], at_most(MOST_BIASED_TOKENS, "entries", num_entries), AfterValidator(_token_ids)]
        | None
    ) = None
    """Added to the logits of the tokens with these ids."""
    seed: int | None = None
    """Equal seeds draw equal answers to equal requests."""
    stop: Stop | None = None
    """A string before which the answer ends, or up to 4 of them, of up to 256 characters each."""
    ignore_eos: bool | None = None
    """Go on after the model's end of text."""
    logprobs: bool | None = None
    """Report the log-probability of every token of the answer."""
    top_logprobs: Annotated[int, _within("top_logprobs")] | None = None
    """Report this many likely tokens at every position too; only with `logprobs: true`."""
    add_generation_prompt: bool | None = None
    """False only with `continue_final_message`."""
    continue_final_message: bool | None = None
    """Continue the last message, an assistant's; needs `add_generation_prompt: false`."""
    moderation: Moderation | None = None
    """Report judgements of the request and of each choice, and say what is done about them."""
    safety: SafetyOptions | None = None
    """What the `safety` object of each choice reports."""
    cache_salt: Salt | None = None
    """Work on prompts that begin alike is shared only with requests of the same salt, or all without one."""

    user: str | None = None
    """Without effect."""
    metadata: Annotated[dict[str, str], at_most(MOST_METADATA, "entries", num_entries)] | None = None
    """Without effect."""
    safety_identifier: str | None = None
    """Without effect."""
    prompt_cache_key: str | None = None
    """Without effect."""
    prompt_cache_options: dict[str, Any] | None = None
    """Without effect."""
    prompt_cache_retention: str | None = None
    """Without effect."""
