"""Draw the next token. Pure functions of one sequence's logits; randomness through its own generator.

Penalties follow the OpenAI API (presence, frequency: over the generated tokens) and Keskar et al.
2019, arXiv 1909.05858 (repetition: over prompt and generated tokens). min_p: Nguyen et al. 2024,
arXiv 2407.01082.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from model.errors import InvalidRequest


class Range(NamedTuple):
    """Allowed values of a sampling parameter; both ends included."""

    low: float
    high: float


RANGES = {
    "temperature": Range(0.0, 2.0),
    "top_p": Range(0.0, 1.0),
    "min_p": Range(0.0, 1.0),
    "top_k": Range(-1, 1_000_000),
    "presence_penalty": Range(-2.0, 2.0),
    "frequency_penalty": Range(-2.0, 2.0),
    "repetition_penalty": Range(0.01, 10.0),
    "top_logprobs": Range(0, 20),
    "min_tokens": Range(0, 1_000_000),
}
"""Ranges of the OpenAI API; of vLLM where OpenAI has no such parameter."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. The defaults are those of the OpenAI API.

    Raises:
        InvalidRequest: if a value is outside `RANGES`, naming the field and the allowed values.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Keep tokens of at least this share of the most likely one's probability."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    top_logprobs: int | None = None
    """Alternatives whose log-probabilities are reported; None reports none at all."""

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed.low <= value <= allowed.high:  # also catches NaN
                raise InvalidRequest(
                    f"{name} must be between {allowed.low:.9g} and {allowed.high:.9g}, got {value}", param=name
                )
        for token_id, bias in self.logit_bias.items():
            if not -100.0 <= bias <= 100.0:
                raise InvalidRequest(
                    f"logit_bias[{token_id}] must be between -100 and 100, got {bias}", param="logit_bias"
                )


_SEED_STRIDE = 1_000_003
"""Keeps the choices of neighbouring seeds apart: seed 1, choice 1 must not draw as seed 2, choice 0."""

GREEDY = SamplingParams(temperature=0.0)

LEAST_TEMPERATURE = 1e-30
"""Any lower one draws the same: the most likely token."""
FIRST = (64, 1024)
"""Tokens that are put in order for `top_p`, more only where these are not enough: to order all takes milliseconds."""


class Draw(NamedTuple):
    """One drawn token with log-probabilities under the model's own, unmodified distribution."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def generator_for(params: SamplingParams, index: int = 0) -> torch.Generator:
    """Return the private generator of choice `index`: equal for equal seeds, whatever else runs."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed((params.seed * _SEED_STRIDE + index) % 2**63)
    return generator


def adjust(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], eos_ids: frozenset[int]
) -> Tensor:
    """Return a float32 copy of `logits` with penalties, bias and `min_tokens` applied.

    Args:
        logits: (V,) of the newest position, on any device; the copy is on the CPU, as the generator is.
        params: penalties, bias and `min_tokens`.
        prompt: token ids before the response.
        output: token ids generated so far.
        eos_ids: tokens that end a response; impossible before `min_tokens`.
    """
    logits = logits.to("cpu", torch.float32, copy=True)  # (V,)
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted({*prompt, *output}), dtype=torch.long)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(output), minlength=logits.numel())  # (V,)
        logits -= params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
    if params.logit_bias:
        biases = torch.tensor([*params.logit_bias.values()], dtype=torch.float32)
        logits.index_add_(0, torch.tensor([*params.logit_bias]), biases)
    if len(output) < params.min_tokens:
        logits[sorted(eos_ids)] = -math.inf
    return logits


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution after temperature, top_k, top_p and min_p, in that order.

    Args:
        logits: adjusted float32 logits, (V,).
        params: `temperature`, which must be over 0, `top_k`, `top_p` and `min_p`.

    Returns:
        Probabilities (V,) that sum to 1, with zeros where a filter removed a token.
    """
    # (V,); no temperature, however small, overflows, and none is 0 in float32
    logits = (logits - logits.max()) / max(params.temperature, LEAST_TEMPERATURE)
    if 0 < params.top_k < logits.numel():
        logits = logits.masked_fill(~_largest(logits, params.top_k), -math.inf)
    probabilities = torch.softmax(logits, dim=-1)
    if params.top_p < 1.0:
        probabilities = probabilities.masked_fill(
            ~_largest(probabilities, _num_within(probabilities, params.top_p)), 0.0
        )
    if params.min_p > 0.0:
        probabilities = probabilities.masked_fill(probabilities < params.min_p * probabilities.max(), 0.0)
    return probabilities / probabilities.sum()


def _largest(values: Tensor, count: int) -> Tensor:
    """Tell which of `values` (V,) are the `count` largest; of equal ones the first, as in argmax."""
    least = values.topk(count).values[-1]
    kept = values > least
    kept[(values == least).nonzero()[: count - int(kept.sum()), 0]] = True
    return kept


def _num_within(probabilities: Tensor, top_p: float) -> int:
    """Return how many of the most likely tokens come before a mass of `top_p` is reached: one at least."""
    num_tokens, count = probabilities.numel(), 0
    for size in (*FIRST, num_tokens):
        ordered = probabilities.topk(min(size, num_tokens)).values
        before = ordered.cumsum(dim=-1) - ordered  # mass of the more likely tokens
        count = int((before < top_p).sum())
        if count < size:
            break
    return max(1, count)


def _is_plain(params: SamplingParams, num_tokens: int) -> bool:
    """Tell whether the next token is that of the highest logit, and nothing else is asked."""
    return (
        params.temperature == 0.0
        and params.top_logprobs is None
        and params.repetition_penalty == 1.0
        and not (params.presence_penalty or params.frequency_penalty or params.logit_bias)
        and num_tokens >= params.min_tokens
    )


def draw(
    logits: Tensor,
    params: SamplingParams,
    generator: torch.Generator,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    eos_ids: frozenset[int] = frozenset(),
    forbidden: int | None = None,
    likeliest: int | None = None,
) -> Draw:
    """Return the next token of one sequence: the most likely one at temperature 0, else a sample.

    One uniform number per token comes from `generator`, so a seed gives the same text alone or
    beside other sequences. `forbidden` is a token that is not drawn and not told of, `likeliest` the first of the
    highest logit, where the caller knows it; the others are as in `adjust`.
    """
    if _is_plain(params, len(output)) and forbidden is None:
        return Draw(int(logits.max(dim=-1).indices) if likeliest is None else likeliest, None, ())
    adjusted = adjust(logits, params, prompt, output, eos_ids)
    if forbidden is not None:
        adjusted[forbidden] = -math.inf
    if params.temperature == 0.0:
        token_id = int(adjusted.argmax())
    else:
        cumulative = filtered_probabilities(adjusted, params).double().cumsum(dim=-1)  # (V,)
        uniform = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        token_id = int(torch.searchsorted(cumulative, uniform, right=True).clamp(max=logits.numel() - 1))
    if params.top_logprobs is None:
        return Draw(token_id, None, ())
    logprobs = torch.log_softmax(logits.float(), dim=-1)  # (V,)
    if forbidden is not None:
        logprobs[forbidden] = -math.inf
    values, ids = torch.topk(logprobs, params.top_logprobs)
    top = tuple((int(token), float(value)) for token, value in zip(ids, values, strict=True))
    return Draw(token_id, float(logprobs[token_id]), top)
