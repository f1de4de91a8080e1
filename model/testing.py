"""Small stand-ins that load in a second without a download; for tests and smoke checks.

The tiny models have random weights and say nothing sensible. `ScriptedLM` says what its script says,
and its risks follow a rule that a test can reason about.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from model.attention import Span
from model.chat import ChatTemplate, EncodedPrompt
from model.checkpoint import fingerprint_weights, save
from model.cls_signal import ClsSignal
from model.config import BaseModel, RefusalConfig, SafetyConfig, Side, Thresholds, TokenHeadConfig
from model.guarded_lm import Assessed, GuardedLM, StepOutput
from model.safety_head import TokenHead

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt_neox")
"""Model types on which the guarded model is tested."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte and the markers of ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped in transformers
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_lm(model_type: str = "llama", *, seed: int = 0, context_length: int = 512, **changes: Any) -> PreTrainedModel:
    """Return a random model of the given type: 3 layers, width 32, a vocabulary for `byte_tokenizer`.

    `changes` replace settings of its configuration.
    """
    settings: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": context_length,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model_type != "gpt_neox":
        settings["num_key_value_heads"] = 2
    if model_type in ("gemma", "qwen3"):
        settings["head_dim"] = 8
    if model_type in ("mistral", "phi3"):
        settings["sliding_window"] = 16
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        config = CONFIG_MAPPING[model_type](**settings | changes)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # untyped in transformers
    return model.eval()  # type: ignore[no-any-return]  # untyped in transformers


def tiny_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> SafetyConfig:
    """Return a safety configuration that fits `model`, without smoothing; `changes` replace fields."""
    fields: dict[str, Any] = {
        "base": BaseModel("tiny", fingerprint_weights(model), ChatTemplate(tokenizer).fingerprint, "float32"),
        "token_head": TokenHeadConfig(layers=(-1,), width=32, hidden=0),
        "request": Thresholds(block=0.9, flag=0.5),
        "response": Thresholds(block=0.9, flag=0.5),
        "onset": 0.5,
        "smoothing": 1.0,
        "refusal": RefusalConfig(prefix="sorry, no", ending=". the end.", max_tokens=24),
    }
    return SafetyConfig(**{**fields, **changes})


def tiny_guarded_lm(model_type: str = "llama", **changes: Any) -> GuardedLM:
    """Return a tiny random model with a random signal; `changes` replace fields of its configuration."""
    model, tokenizer = tiny_lm(model_type), byte_tokenizer()
    config = tiny_config(model, tokenizer, **changes)
    return GuardedLM(model, tokenizer, _random_head(config), config, _random_cls(config))


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """Write a tiny model and its safety checkpoint; return both folders."""
    lm = tiny_guarded_lm()
    lm.model.save_pretrained(folder / "model")
    lm.tokenizer.save_pretrained(folder / "model")
    assert lm.config is not None
    save(folder / "checkpoint", lm.head, lm.config)
    return folder / "model", folder / "checkpoint"


def _random_head(config: SafetyConfig) -> TokenHead | None:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        return TokenHead(config.token_head) if config.token_head is not None else None


def _random_cls(config: SafetyConfig) -> ClsSignal | None:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(2)
        signal = ClsSignal(32) if config.cls is not None else None
        if signal is not None:
            torch.nn.init.normal_(signal.embedding, std=0.5)
    return signal


class _Fed(list[int]):
    """Ids that were fed, and how many of them are the request."""

    def __init__(self, num_request: int) -> None:
        super().__init__()
        self.num_request = num_request


class ScriptedLM(GuardedLM):
    """Says its script whatever it is asked; an upper-case letter is harm.

    The request risk is high where the request holds an upper-case letter in the user's turns; the
    response risk is high at every token that is an upper-case letter, and at every `[CLS]` that reads one.

    Args:
        script: what it answers; it ends with end-of-sequence.
        refusal_script: how it continues a refusal.
        second_script: what it answers where the first token of its script is forbidden.
        fails_at: raises at the forward pass of this number, to test how faults are contained.
    """

    HIGH, LOW = 8.0, -8.0

    def __init__(
        self,
        script: str,
        refusal_script: str = ". bye.",
        second_script: str = "",
        *,
        fails_at: int | None = None,
        **changes: Any,
    ) -> None:
        lm = tiny_guarded_lm(**changes)
        super().__init__(lm.model, lm.tokenizer, lm.head, lm.config, lm.cls)
        self._script = script
        self._refusal_script = refusal_script
        self._second_script = second_script
        self._fails_at = fails_at
        self.fed: list[tuple[int, ...]] = []
        """The new tokens of every forward pass."""
        self.spans: list[tuple[Span, ...]] = []
        """What `[CLS]` read in every forward pass."""

    def forward(
        self, token_ids: Sequence[int], cache: Any, *, states_of_last: int = 0, spans: Sequence[Span] = ()
    ) -> StepOutput:
        """Return logits that make the script's next token certain, and states that are request and response logit."""
        self.fed.append(tuple(token_ids))
        self.spans.append(tuple(spans))
        if self._fails_at is not None and len(self.fed) == self._fails_at:
            raise RuntimeError("scripted fault")
        cache.extend(token_ids)
        logits = torch.full((self.vocab_size,), -50.0)
        logits[self._next(list(cache))] = 50.0
        if self._second_script and len(cache) == cache.num_request:
            logits[self.tokenizer.encode(self._second_script)[0]] = 40.0
        request = self._logit(self._request_text(list(cache)))
        response = [str(self.tokenizer.decode([token])) for token in cache[cache.num_request :]]
        copies = [[request, self._logit("".join(response[s.read.start : s.read.stop]))] for s in spans]
        newest = [str(self.tokenizer.decode([token])) for token in token_ids[-states_of_last:]]
        states = [[request, self._logit(text)] for text in newest]
        is_read = self.head is not None and states_of_last > 0
        return StepOutput(logits, torch.tensor(states) if is_read else None, torch.tensor(copies) if spans else None)

    def assess(self, side: Side, features: Tensor) -> Assessed:
        """Return the logits that stand in the states themselves."""
        logits: list[float] = features[:, 0 if side == "request" else 1].tolist()
        return Assessed(logits, 1e-5)

    def assess_cls(self, side: Side, copies: Tensor) -> Assessed:
        """Return the logits that stand in the copies themselves."""
        return self.assess(side, copies)

    def new_cache(self, prompt: EncodedPrompt | None = None) -> Any:
        """Return a list of the ids fed so far."""
        return _Fed(len(prompt.request) if prompt is not None else 0)

    def _logit(self, text: str) -> float:
        return self.HIGH if any(map(str.isupper, text)) else self.LOW

    def crop(self, cache: Any, length: int) -> None:
        """Forget the ids after the first `length`."""
        del cache[length:]

    def _split(self, ids: list[int]) -> tuple[str, str]:
        """Return the request and the response that `ids` hold, as text."""
        request, _, response = str(self.tokenizer.decode(ids)).rpartition("<|im_start|>assistant\n")
        return request, response

    def _request_text(self, ids: list[int]) -> str:
        return self._split(ids)[0]

    def _next(self, ids: list[int]) -> int:
        response = self._split(ids)[1]
        assert self.config is not None
        prefix = self.config.refusal.prefix
        script = prefix + self._refusal_script if response.startswith(prefix) else self._script
        if self._second_script and not script.startswith(response):
            script = self._second_script
        rest = script[len(response) :]
        return int(self.tokenizer.encode(rest)[0]) if rest else int(self.tokenizer.eos_token_id)
