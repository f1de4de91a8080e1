"""Wraps any Hugging Face causal language model: one forward pass gives logits, and what the signal reads.

The model's code is not touched. The token head reads hidden states that the pass computes anyway; `[CLS]` is one
more row of it.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from model import cls_signal
from model.attention import Span, Windows
from model.cache_keyword import with_cache
from model.chat import ChatTemplate, EncodedPrompt
from model.cls_signal import ClsCache, ClsSignal
from model.config import ClsConfig, SafetyConfig, Side
from model.errors import CheckpointError, origin
from model.pretrained import eos_ids_of
from model.safety_head import TokenHead
from model.schedule import Every

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass over T new tokens gives."""

    logits: Tensor
    """Next-token logits after the newest token, (V,); on the CPU where states were asked for."""
    states: Tensor | None
    """Hidden states of the head's layers side by side, (N, S), at the tokens asked for; None if there are none."""
    copies: Tensor | None = None
    """Final states of `[CLS]`, one for each span, (K, D); None without spans."""


class Assessed(NamedTuple):
    """What one side of the signal says of N positions."""

    logits: list[float]
    """NaN where the signal failed."""
    seconds: float
    """Until the logits lay on the CPU."""


class GuardedLM:
    """A causal language model with its safety signal, one sequence at a time.

    Args:
        model: any causal LM whose `forward` returns hidden states.
        tokenizer: the model's tokenizer.
        head: the token head, or None.
        config: the safety configuration that belongs to the signal; None for a model without one.
        cls: the `[CLS]` signal, or None.
        reads_cls: response tokens read `[CLS]` (strategic attention); off is the published ablation. None takes the
            configuration's.
        schedule: when assessments are made, by name; None takes the configuration's.

    Raises:
        CheckpointError: if the signal does not fit the model.
        ValueError: if there is no such schedule.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head: TokenHead | None = None,
        config: SafetyConfig | None = None,
        cls: ClsSignal | None = None,
        *,
        reads_cls: bool | None = None,
        schedule: str | None = None,
    ) -> None:
        if (head is None and cls is None) != (config is None):
            raise ValueError("a signal needs its safety configuration, and the other way round")
        self.model = model
        self.tokenizer = tokenizer
        self.head = head.to(model.device).eval() if head is not None else None
        self.config = config
        self.cls = cls.to(model.device).eval() if cls is not None else None
        self.schedule = config.schedule(schedule) if config is not None else Every()
        self.cls_config = (config.cls if config is not None else None) or ClsConfig()
        self.reads_cls = cls is not None and (self.cls_config.is_read if reads_cls is None else reads_cls)
        self.windows = Windows(*self.cls_config.windows)
        self.chat = ChatTemplate(tokenizer, marks_content=cls is not None)
        text_config = model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.context_length: int = int(text_config.max_position_embeddings)
        self.eos_ids = eos_ids_of(model, tokenizer)
        prefix = config.refusal.prefix if config is not None else ""
        self.refusal_ids: tuple[int, ...] = tuple(tokenizer.encode(prefix, add_special_tokens=False))
        """Of the refusal prefix; none without a signal."""
        if config is not None and config.token_head is not None:
            _check_layers(config.token_head.layers, config.token_head.width, text_config)
        if cls is not None:
            cls_signal.check(cls, model)

    def new_cache(self, prompt: EncodedPrompt | None = None) -> DynamicCache:
        """Return an empty cache that can be cropped to any length.

        It is built without the model's configuration, because sliding-window layers of a configured
        cache forget tokens, and a rollback could not return to them.

        Args:
            prompt: what will be read; a `[CLS]` signal must know where the request ends, and what in it is text.
        """
        if self.cls is None:
            return DynamicCache()
        assert prompt is not None
        return ClsCache(prompt.content or (True,) * len(prompt.request))

    def crop(self, cache: DynamicCache, length: int) -> None:
        """Shorten `cache` to its first `length` tokens. Where there is a `[CLS]`, the next pass must assess."""
        if isinstance(cache, ClsCache):
            cache.shorten(length)
        elif (surplus := cache.get_seq_length() - length) > 0:
            cache.crop(-surplus)

    @property
    def reads_query(self) -> bool:
        """Whether the token head reads every token of the query."""
        return self.head is not None and self.head.query is not None

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Sequence[int],
        cache: DynamicCache,
        *,
        states_of_last: int = 0,
        spans: Sequence[Span] = (),
    ) -> StepOutput:
        """Feed new tokens of one sequence.

        Args:
            token_ids: the T new tokens; at least one, unless the pass assesses.
            cache: keys and values of the tokens before them; extended in place.
            states_of_last: return the hidden states that the head reads at the last this many of the new tokens.
            spans: what `[CLS]` assesses in this pass.
        """
        is_read = self.head is not None and states_of_last > 0
        if self.cls is not None:
            assert isinstance(cache, ClsCache)
            logits, hidden_states, copies = cls_signal.feed(
                self.model, self.cls, cache, token_ids, spans, is_read=self.reads_cls, moves=self.cls_config.moves
            )
        else:
            ids = torch.tensor([token_ids], device=self.model.device)  # (1, T)
            output = self.model(
                input_ids=ids, logits_to_keep=1, output_hidden_states=is_read, **with_cache(self.model, cache)
            )
            logits, copies = output.logits[0, -1], None  # (V,)
            hidden_states = tuple(state[0] for state in output.hidden_states) if is_read else ()
        if self.head is None or not is_read:
            return StepOutput(logits, None, copies if spans else None)
        logits = logits.to("cpu")  # waits for the pass, so that the head's time is its own; the sampler needs it there
        layers = [hidden_states[layer][-states_of_last:] for layer in self.head.config.layers]
        return StepOutput(logits, torch.cat(layers, dim=-1), copies if spans else None)

    @torch.inference_mode()
    def assess(self, side: Side, features: Tensor) -> Assessed:
        """Return the head's logits at N positions; NaN if the head fails, never an exception.

        Args:
            side: whose risk.
            features: what `Passage.extend` made of the states, (N, 2 * S).
        """
        head = self.head
        assert head is not None
        return _timed(lambda: head.of(side)(features).tolist(), len(features))

    @torch.inference_mode()
    def assess_query(self, states: Tensor) -> Assessed:
        """Return the head's logits at N tokens of a query; NaN if the head fails, never an exception.

        Args:
            states: of the head's layers side by side, (N, S), any dtype.
        """
        assert self.head is not None
        query = self.head.query
        assert query is not None
        return _timed(lambda: query(states.float()).tolist(), len(states))

    @torch.inference_mode()
    def assess_cls(self, side: Side, copies: Tensor) -> Assessed:
        """Return the logits of K copies of `[CLS]`; NaN if its head fails, never an exception.

        Args:
            side: whose risk.
            copies: their final states, (K, D).
        """
        cls = self.cls
        assert cls is not None
        return _timed(lambda: cls(copies)[:, cls_signal.OUTPUTS.index(side)].tolist(), len(copies))


def _timed(logits_of: Callable[[], list[float]], num_logits: int) -> Assessed:
    """Return what `logits_of` gives, NaN for each of `num_logits` if it fails."""
    start = time.perf_counter()
    try:
        logits = logits_of()
    except Exception as error:
        logger.error("the safety head failed; its risks count as unsafe: %s", origin(error))
        logits = [math.nan] * num_logits
    return Assessed(logits, time.perf_counter() - start)


def _check_layers(layers: tuple[int, ...], width: int, text_config: object) -> None:
    """Raise a CheckpointError if the head reads states that this model does not have."""
    num_layers = int(getattr(text_config, "num_hidden_layers"))  # noqa: B009 - config classes differ by family
    model_width = int(getattr(text_config, "hidden_size"))  # noqa: B009 - as above
    if width != model_width:
        raise CheckpointError(f"the head reads states of width {width}, the model's are {model_width} wide")
    if bad := [layer for layer in layers if not -1 <= layer <= num_layers]:
        raise CheckpointError(f"the head reads layers {bad}; the model has -1 (final) and 0 to {num_layers}")
