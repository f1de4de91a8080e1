"""Body of `/v1/chat/completions`: which fields are honoured, and which are refused."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.protocol.moderation import Moderation
from server.protocol.shared import RequestModel, Text, TextPart


def _content_kind(value: Any) -> str:
    return "(parts)" if isinstance(value, list) else "(text)"


Content = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[list[TextPart], Tag("(parts)")], Discriminator(_content_kind)
]
"""A string, or a list of text parts. Tags in parentheses are left out of a field's name in errors."""


MOST_BIASED_TOKENS = 1024
"""Entries of `logit_bias`: each costs time at every token, in the one thread that serves everybody."""
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
    content: Content | None = None
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
    if len(bias) > MOST_BIASED_TOKENS:
        message = f"must have at most {MOST_BIASED_TOKENS} entries, got {len(bias)}"
        raise PydanticCustomError("invalid_value", "{message}", {"message": message})
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
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[Text, AfterValidator(_not_empty)]],
    Field(max_length=4),
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
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_token_ids)] | None = None
    seed: int | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Continue the last message, an assistant's; needs `add_generation_prompt: false`."""
    moderation: Moderation | None = None
    safety: SafetyOptions | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
