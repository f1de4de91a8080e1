"""The answer to one chat request, as one JSON object or as the chunks of a stream."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from model.events import Event, Finish
from model.guarded_lm import GuardedLM
from model.policy import Mode
from server.answer import Answer
from server.protocol.chat import ChatRequest
from server.protocol.completion import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChunkChoice,
    Delta,
    Safety,
    Usage,
)
from server.protocol.moderation import InBandModeration
from server.results import in_band, safety
from server.settings import Exposure


@dataclass
class ChatAnswer:
    """Collects the events of every choice and writes them in the OpenAI shapes."""

    completion_id: str
    model: str
    created: int
    body: ChatRequest
    modes: tuple[Mode, Mode]
    lm: GuardedLM
    exposure: Exposure
    refusal_in_content: bool
    num_choices: int
    answers: list[Answer] = field(init=False)
    finishes: dict[int, Finish] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.answers = [
            Answer(
                self.lm.tokenizer,
                with_logprobs=bool(self.body.logprobs),
                refusal_in_content=self.refusal_in_content,
            )
            for _ in range(self.num_choices)
        ]

    @property
    def finish_reason(self) -> str:
        """The finish reason of the choices together: content_filter, length or stop, whichever one had first."""
        reasons = {finish.reason for finish in self.finishes.values()}
        return next((reason for reason in ("content_filter", "length", "stop") if reason in reasons), "")

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt, once, and of all choices."""
        finishes = self.finishes.values()
        prompt = max((finish.prompt_tokens for finish in finishes), default=0)
        completion = sum(finish.completion_tokens for finish in finishes)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def add(self, index: int, item: Event) -> ChatCompletionChunk | None:
        """Take in an event of choice `index`; return the chunk it makes, if it makes one."""
        answer = self.answers[index]
        if isinstance(item, Finish):
            self.finishes[index] = item
            delta = Delta(refusal=answer.refusal) if answer.refusal else Delta()
            return self._chunk(index, delta, finish=item) if self.body.stream else None
        content = answer.add(item)
        if content is None or not self.body.stream:
            return None
        return self._chunk(index, Delta(content=content))

    def whole(self) -> ChatCompletion:
        """Return the finished answer."""
        completion = ChatCompletion(
            id=self.completion_id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(index, answer) for index, answer in enumerate(self.answers)],
            usage=self.usage,
            system_fingerprint=None,
        )
        if self.body.moderation is None:
            return completion
        return completion.model_copy(update={"moderation": self._moderation()})

    def opening(self) -> Iterator[ChatCompletionChunk]:
        """Yield the first chunk of every choice: the role, and no content."""
        for index in range(self.num_choices):
            yield self._chunk(index, Delta(role="assistant"))

    def closing(self) -> Iterator[ChatCompletionChunk]:
        """Yield the chunks after the last finish reason: moderation, then usage, as far as asked for.

        The order matters: clients keep the usage of the last chunk.
        """
        if self.body.moderation is not None:
            yield self._envelope([]).model_copy(update={"moderation": self._moderation()})
        if self._has_usage:
            yield self._envelope([]).model_copy(update={"usage": self.usage})

    @property
    def _has_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _choice(self, index: int, answer: Answer) -> Choice:
        return Choice(
            index=index,
            message=AnswerMessage(role="assistant", content=answer.content, refusal=answer.refusal),
            logprobs=answer.take_logprobs(),
            finish_reason=self.finishes[index].reason,
            safety=self._safety(index),
        )

    def _chunk(self, index: int, delta: Delta, finish: Finish | None = None) -> ChatCompletionChunk:
        choice = ChunkChoice(
            index=index,
            delta=delta,
            logprobs=self.answers[index].take_logprobs(),
            finish_reason=finish.reason if finish else None,
        )
        if finish is not None:
            choice = choice.model_copy(update={"safety": self._safety(index)})
        return self._envelope([choice])

    def _envelope(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self.completion_id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            system_fingerprint=None,
            choices=choices,
        )
        return chunk.model_copy(update={"usage": None}) if self._has_usage else chunk

    def _safety(self, index: int) -> Safety:
        wants_trace = self.body.safety is not None and self.body.safety.trace
        trace = self.answers[index].trace() if wants_trace else None
        return safety(self.finishes[index], self.exposure, trace)

    def _moderation(self) -> InBandModeration:
        finishes = [self.finishes[index] for index in range(self.num_choices)]
        return in_band(self.model, finishes, self.lm.config, self.modes, self.exposure)
