"""Suffixes that make a guarded model comply, found by gradient: GCG, on the language model and its signal together.

    python -m evaluation.gcg --checkpoint smollm2-135m/all-rows --data data/eval/prefill.jsonl --out gcg.jsonl
    python -m evaluation.attack ready --data gcg.jsonl --out runs/gcg      # what a server makes of them

The attacker holds the weights. The loss is that of GCG (Zou et al. 2023, arXiv 2307.15043), the cross entropy of the
first tokens of a harmful response, and for an adaptive attacker how far the signal's risks lie over the thresholds that
the policy acts on; `--weight 0` is GCG as published, on the language model as it is served. It needs a GPU to be worth
its name: on a CPU a few behaviours and steps say little about a stronger attacker.

The search is nanogcg's: `pip install --no-deps nanogcg==0.3.0`, because its own requirements ask for an older
transformers. Deviations from it: no special token may stand in a suffix, and where every message of the chat template
begins with the token for the beginning of text (ChatML), that token is left in the template.
"""

import argparse
import copy
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import PreTrainedTokenizerBase

from evaluation import lines
from evaluation.beginnings import beginnings
from evaluation.rows import Row, select
from evaluation.target import fingerprint
from model import checkpoint
from model.attention import Span, pass_mask, pass_places, window
from model.chat import EncodedPrompt, Message
from model.cls_signal import OUTPUTS, Masks, forward, sliding_windows
from model.errors import ModelError
from model.guarded_lm import GuardedLM
from model.pretrained import DEFAULT_MODEL, device_of, load
from model.safety_head import Passage
from model.schedule import positions
from model.trace import logit_of

try:
    from nanogcg.gcg import GCG, GCGConfig
    from nanogcg.utils import get_nonascii_toks
except ImportError as error:
    raise ImportError(f"evaluation.gcg needs `pip install --no-deps nanogcg==0.3.0` ({error})") from error

INIT = 20 * " x"
TORN = b'{"prompt"'
"""Begins a line of attack prompts, one that was torn too."""
MARGIN = 1.0
"""Logits below a threshold from which on the signal does not weigh any more."""


@dataclass(frozen=True)
class Settings:
    """What a search is told."""

    model: str
    checkpoint: str | None
    fingerprint: str | None
    """Of the checkpoint's files, or of the plain model."""
    dtype: str
    """Of the model."""
    steps: int
    width: int
    """Candidates that are tried in each step."""
    weight: float
    """Of the signal beside the cross entropy; 0 is GCG as published."""
    target_tokens: int
    """Tokens of a harmful response that the suffix is to bring about."""
    seed: int
    """Of the draws."""


class Logits(NamedTuple):
    """What a pass over B sequences with a target of T tokens gives."""

    tokens: Tensor
    """Next-token logits before each token of the target, (B, T, V)."""
    request: Tensor | None
    """Logit of the request risk, (B,); None without a signal."""
    response: Tensor | None
    """Logit of the response risk after each token of the target, (B, T)."""


class SignalGCG(GCG):  # type: ignore[misc]  # untyped
    """GCG whose loss reads what the server reads: language model, token head and `[CLS]`.

    Args:
        lm: the guarded model.
        config: of the search; without a prefix cache.
        weight: of the signal.
    """

    def __init__(self, lm: GuardedLM, config: GCGConfig, weight: float) -> None:
        lm.model.requires_grad_(False)
        super().__init__(lm.model, _without_markers(lm.tokenizer), config)
        # Text may hold no special token: the server refuses it.
        special = torch.tensor(sorted({*lm.tokenizer.all_special_ids, *lm.tokenizer.get_added_vocab().values()}))
        self.not_allowed_ids = torch.cat([get_nonascii_toks(lm.tokenizer), special]).to(lm.model.device)
        self._lm = lm
        self._weight = weight
        self.prompt = EncodedPrompt((0,))
        self.num_queries = 0
        """Sequences that the model has read."""

    def attack(self, request: str, target: str) -> Any:
        """Return the result of a search for a suffix after `request` that begins the response with `target`.

        Raises:
            ModelError: if the chat template cannot be taken apart around the suffix.
        """
        self.prompt = self._lm.chat.encode([Message("user", f"{request}{INIT}")])
        return self.run([{"role": "user", "content": f"{request}{{optim_str}}"}], target)

    def compute_token_gradient(self, optim_ids: Tensor) -> Tensor:
        """Return the gradient of the loss by the one-hot suffix, (1, N, V)."""
        weight: Tensor = self.embedding_layer.weight
        chosen = one_hot(optim_ids, num_classes=len(weight)).to(weight.dtype).requires_grad_()
        embeddings = torch.cat([self.before_embeds, chosen @ weight, self.after_embeds, self.target_embeds], dim=1)
        (gradient,) = torch.autograd.grad(self.losses(embeddings).sum(), chosen)
        return gradient

    @torch.no_grad()
    def _compute_candidates_loss_original(self, search_batch_size: int, input_embeds: Tensor) -> Tensor:
        return torch.cat([self.losses(some) for some in torch.split(input_embeds, search_batch_size)])

    def losses(self, embeddings: Tensor) -> Tensor:
        """Return the loss of every sequence, (B,).

        Args:
            embeddings: of the request with its suffix, and of the target's tokens, (B, L, D).
        """
        self.num_queries += len(embeddings)
        tokens, request, response = self.logits(embeddings)
        wanted = self.target_ids.expand(len(embeddings), -1)  # (B, T)
        found = cross_entropy(tokens.float().transpose(1, 2), wanted, reduction="none").mean(dim=1)
        config = self._lm.config
        if self._weight and config is not None:
            assert request is not None
            assert response is not None
            over = (request - logit_of(config.request.block) + MARGIN).relu()
            over = over + (response - logit_of(config.response.block) + MARGIN).relu().mean(dim=1)
            found = found + self._weight * over
        return found

    def logits(self, embeddings: Tensor) -> Logits:
        """Return what language model and signal say of every sequence, as decoding token by token would."""
        lm, num_target = self._lm, self.target_ids.shape[1]
        length = embeddings.shape[1]
        num_request = length - num_target
        content, query_start = self._layout(num_request)
        covered = [0, *positions(lm.schedule, num_target)] if lm.cls is not None else []
        spans = [Span(n, window(n, lm.windows, is_malicious=False)) for n in covered]
        masks: Masks = {}
        rows, places = embeddings, torch.arange(length)
        if lm.cls is not None:
            rows = torch.cat([rows, lm.cls.embedding.to(rows).expand(len(rows), len(spans), -1)], dim=1)
            places = torch.tensor(pass_places(0, length, num_request, spans, moves=lm.cls_config.moves))
            for kind, reach in sliding_windows(lm.model).items():
                mask = pass_mask(content, 0, length, spans, sliding_window=reach, is_read=lm.reads_cls)
                masks[kind] = mask[:, 1:].expand(len(rows), -1, -1)  # nobody reads slot 0: the first copy is newer
        kept = torch.arange(num_request - 1, length - 1, device=lm.model.device)
        output = forward(lm.model, rows, masks, places[None], logits_to_keep=kept, use_cache=False)
        request: Tensor | None = None
        response: Tensor | None = None
        if (token := self._of_tokens(output.hidden_states, num_request, length, query_start)) is not None:
            request, response = token
        if lm.cls is not None:
            of_copies = lm.cls(output.hidden_states[-1][:, length:])  # (B, K, 2)
            request, response = self._both(token, of_copies, covered, num_target)
        if request is not None and lm.reads_query:
            states = [state[:, query_start:num_request] for state in output.hidden_states]
            request = torch.maximum(request, self._highest(states))
        return Logits(output.logits, request, response)

    def _highest(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Return the highest smoothed logit of each query, (B,): what `model.trace.Highest` finds, without limits."""
        head, config = self._lm.head, self._lm.config
        assert head is not None
        assert head.query is not None
        assert config is not None
        states = torch.cat([hidden_states[layer] for layer in head.config.layers], dim=-1).float()  # (B, T, S)
        logits: Tensor = head.query(states.flatten(0, 1)).view(states.shape[:2])  # (B, T)
        smoothed = found = logits[:, 0]
        for logit in logits[:, 1:].unbind(dim=1):
            smoothed = torch.lerp(smoothed, logit, config.smoothing)
            found = torch.maximum(found, smoothed)
        return found

    def _of_tokens(
        self, hidden_states: Sequence[Tensor], num_request: int, length: int, query_start: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return the token head's logits of request (B,) and response (B, T), if there is one."""
        head = self._lm.head
        if head is None:
            return None
        states = torch.cat([hidden_states[layer][:, :length] for layer in head.config.layers], dim=-1)  # (B, L, S)
        request = torch.stack([Passage().extend(row[query_start:num_request])[-1] for row in states])
        response = torch.stack([Passage().extend(row[num_request:]) for row in states])  # (B, T, 2 * S)
        return head.request(request), head.response(response.flatten(0, 1)).view(response.shape[:2])

    def _both(
        self, token: tuple[Tensor, Tensor] | None, of_copies: Tensor, covered: Sequence[int], num_target: int
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of request and response as `model.reader.combine` makes them of both signals."""
        config = self._lm.cls_config
        request = of_copies[:, 0, OUTPUTS.index("request")]
        newest = [max(place for place, n in enumerate(covered) if n <= number) for number in range(1, num_target + 1)]
        response = of_copies[:, newest, OUTPUTS.index("response")]  # (B, T)
        if token is None:
            return request, response
        ours, theirs = token
        request = torch.lerp(ours, request, config.request_share)
        mean = torch.lerp(theirs, response, config.response_share)
        is_fresh = torch.tensor([number in covered for number in range(1, num_target + 1)], device=mean.device)
        return request, torch.where(is_fresh, mean, torch.maximum(mean, theirs))

    def _layout(self, num_request: int) -> tuple[tuple[bool, ...], int]:
        """Return which tokens of the request are the attacker's text, and where the query begins.

        Raises:
            ModelError: if the request that the search made has other tokens than the server's.
        """
        ids = torch.tensor(self.prompt.request, device=self._lm.model.device)
        embedded = self.embedding_layer(ids)[None]  # (1, R, D)
        before, after = self.before_embeds.shape[1], self.after_embeds.shape[1]
        is_same = torch.equal(embedded[:, :before], self.before_embeds)
        is_same = is_same and torch.equal(embedded[:, len(ids) - after :], self.after_embeds)
        if not is_same:
            raise ModelError("the chat template makes other tokens of a request than the search for a suffix")
        flags = self.prompt.content or (True,) * len(ids)
        suffix = (True,) * (num_request - before - after)
        return (*flags[:before], *suffix, *flags[len(ids) - after :]), self.prompt.query_start


def _without_markers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer without a token for the beginning of text, where it would never add one itself.

    nanogcg takes that token out of the rendered template, which in ChatML begins every message.
    """
    found = copy.deepcopy(tokenizer)
    if found.bos_token_id not in found("a").input_ids:
        found.bos_token = None
    return found


def craft(lm: GuardedLM, rows: Sequence[Row], out: Path, settings: Settings, batch_size: int) -> None:
    """Append an attack prompt for each row that `out` does not hold, with what the search came to.

    Raises:
        ModelError: as `SignalGCG.attack`.
        ValueError: if `out` holds prompts of other settings, or no response is as long as the target.
    """
    facts = vars(settings)
    try:
        found = [dict(json.loads(line)) for line in lines.whole(out)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{out} holds something else than attack prompts ({error}); choose another --out") from error
    torn = b"" if found or not out.is_file() else out.read_bytes()
    if torn and not torn.startswith(TORN[: len(torn)]):
        raise ValueError(f"{out} holds something else than attack prompts; choose another --out")
    if any({name: row.get(name) for name in facts} != facts for row in found):
        raise ValueError(f"{out} holds prompts of other settings; choose another --out")
    done = {(row["prompt"], row["target"]) for row in found}
    targets = beginnings(rows, settings.target_tokens, lm.tokenizer)
    if not targets:
        raise ValueError(f"no harmful response has {settings.target_tokens} tokens")
    lines.mend(out)
    logging.getLogger("nanogcg").setLevel(logging.ERROR)  # it tells every step
    config = GCGConfig(
        num_steps=settings.steps,
        search_width=settings.width,
        optim_str_init=INIT,
        batch_size=batch_size,
        use_prefix_cache=False,
        seed=settings.seed,
    )
    for row, ids in targets:
        target = str(lm.tokenizer.decode(ids))
        if (row.prompt, target) in done:
            continue
        search = SignalGCG(lm, config, settings.weight)
        result = search.attack(row.prompt, target)
        came_to = {"first_loss": result.losses[0], "best_loss": result.best_loss, "queries": search.num_queries}
        attacked = {
            "prompt": row.prompt,
            "attack_prompt": f"{row.prompt}{result.best_string}",
            "harmful": 1,
            "target": target,
        }
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(attacked | {"source": "GCG"} | facts | came_to) + "\n")
        sys.stdout.write("loss {first_loss:.3f} to {best_loss:.3f} after {queries} queries\n".format(**came_to))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Find suffixes that make a guarded model comply.")
    parser.add_argument("--checkpoint", help=f"a folder, or one of {checkpoint.shipped()}; by default a plain model")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the model under it (%(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of prompt and harmful_response")
    parser.add_argument("--n", type=int, default=50, help="most prompts (%(default)s)")
    parser.add_argument("--steps", type=int, default=250, help="steps of the search (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="candidates in each step (%(default)s)")
    parser.add_argument("--weight", type=float, default=1.0, help="of the signal; 0 is GCG as published (%(default)s)")
    parser.add_argument("--target-tokens", type=int, default=12, help="tokens that it aims at (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="candidates at a time (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of the model; on a CPU without AVX-512 BF16, float32 takes half of the time (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of attack prompts; given again, it goes on")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.weight:
        parser.error("a plain model has no signal: it takes --weight 0")
    try:
        folder = None if args.checkpoint is None else checkpoint.find(args.checkpoint)
        of = fingerprint(f"hub:{args.model}" if folder is None else f"checkpoint:{folder}")
        told = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name != "fingerprint"}
        settings = Settings(**told, fingerprint=of)
        rows = select(args.data, args.n, label=1, response="harmful_response")
        pretrained = load(args.model, dtype=getattr(torch, args.dtype), device=device_of("auto"))
        if folder is None:
            lm = GuardedLM(pretrained.model, pretrained.tokenizer)
        else:
            lm = checkpoint.attach(pretrained, folder)
        craft(lm, rows, args.out, settings, args.batch_size)
    except (ModelError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.gcg: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
