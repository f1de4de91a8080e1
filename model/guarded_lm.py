"""Wraps any Hugging Face causal language model: one forward pass gives logits and risks.

The model's code is not touched. The head reads hidden states that the pass computes anyway.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from model.chat import ChatTemplate
from model.config import SafetyConfig, Side
from model.errors import CheckpointError, origin
from model.safety_head import TokenHead

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What one forward pass over T new tokens gives."""

    logits: Tensor
    """Next-token logits after the newest token, (V,); on the CPU where states were asked for."""
    states: Tensor | None
    """Hidden states of the head's layers side by side, (N, S), at the tokens asked for; None if there are none."""


class Assessed(NamedTuple):
    """What the head says of N positions."""

    logits: list[float]
    """NaN where the head failed."""
    seconds: float
    """Until the logits lay on the CPU."""


class GuardedLM:
    """A causal language model with its safety signal, one sequence at a time.

    Args:
        model: any causal LM whose `forward` returns hidden states.
        tokenizer: the model's tokenizer.
        head: the token head, or None for a model without a signal.
        config: the safety configuration that belongs to `head`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head: TokenHead | None = None,
        config: SafetyConfig | None = None,
    ) -> None:
        if (head is None) != (config is None):
            raise ValueError("a head needs its safety configuration, and the other way round")
        self.model = model
        self.tokenizer = tokenizer
        self.head = head.to(model.device).eval() if head is not None else None
        self.config = config
        self.chat = ChatTemplate(tokenizer)
        text_config = model.config.get_text_config()
        self.vocab_size: int = text_config.vocab_size
        self.context_length: int = int(text_config.max_position_embeddings)
        self.eos_ids = _eos_ids(model, tokenizer)
        if config is not None:
            _check_layers(config.token_head.layers, config.token_head.width, text_config)

    def new_cache(self) -> DynamicCache:
        """Return an empty cache that can be cropped to any length.

        It is built without the model's configuration, because sliding-window layers of a configured
        cache forget tokens, and a rollback could not return to them.
        """
        return DynamicCache()

    def crop(self, cache: DynamicCache, length: int) -> None:
        """Shorten `cache` to its first `length` tokens."""
        surplus = cache.get_seq_length() - length
        if surplus > 0:
            cache.crop(-surplus)

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], cache: DynamicCache, *, states_of_last: int = 0) -> StepOutput:
        """Feed new tokens of one sequence.

        Args:
            token_ids: the T new tokens, at least one.
            cache: keys and values of the tokens before them; extended in place.
            states_of_last: return the hidden states that the head reads at the last this many of the new tokens.
        """
        ids = torch.tensor([token_ids], device=self.model.device)  # (1, T)
        is_read = self.head is not None and states_of_last > 0
        output = self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, output_hidden_states=is_read
        )
        logits = output.logits[0, -1]  # (V,)
        if self.head is None or not is_read:
            return StepOutput(logits, None)
        logits = logits.to("cpu")  # waits for the pass, so that the head's time is its own; the sampler needs it there
        layers = [output.hidden_states[layer][0, -states_of_last:] for layer in self.head.config.layers]
        return StepOutput(logits, torch.cat(layers, dim=-1))

    @torch.inference_mode()
    def assess(self, side: Side, features: Tensor) -> Assessed:
        """Return the head's logits at N positions; NaN if the head fails, never an exception.

        Args:
            side: whose risk.
            features: what `Passage.extend` made of the states, (N, 2 * S).
        """
        assert self.head is not None
        start = time.perf_counter()
        try:
            logits: list[float] = self.head.of(side)(features).tolist()
        except Exception as error:
            logger.error("the safety head failed; its risks count as unsafe: %s", origin(error))
            logits = [math.nan] * len(features)
        return Assessed(logits, time.perf_counter() - start)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends a response, from the generation config and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if isinstance(token, int))


def _check_layers(layers: tuple[int, ...], width: int, text_config: object) -> None:
    """Raise a CheckpointError if the head reads states that this model does not have."""
    num_layers = int(getattr(text_config, "num_hidden_layers"))  # noqa: B009 - config classes differ by family
    model_width = int(getattr(text_config, "hidden_size"))  # noqa: B009 - as above
    if width != model_width:
        raise CheckpointError(f"the head reads states of width {width}, the model's are {model_width} wide")
    if bad := [layer for layer in layers if not -1 <= layer <= num_layers]:
        raise CheckpointError(f"the head reads layers {bad}; the model has -1 (final) and 0 to {num_layers}")
