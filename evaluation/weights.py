"""What the weights alone do: refusals after harmful beginnings, benign prompts declined, perplexity. Nothing acts.

    python -m evaluation.weights --model smollm2-135m --adapter runs/deepened/adapter --data data/eval --out runs/w

With an adapter the plain model answers the benign prompts too, and what it declines itself is told apart.
Everything is greedy and in batches; `[CLS]` is not read. A response counts as a refusal where it holds a refusal
phrase; text that neither refuses nor harms is "not refused" too.
The responses are kept in `--out`, for other judges and so that an interrupted run goes on.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from evaluation.beginnings import beginnings
from evaluation.completions import completions
from evaluation.intervals import Estimate, resampled, wilson
from evaluation.judges import by_phrases, is_refusal
from evaluation.rows import Row, read, sample
from evaluation.samples import Journal, Sample, key_of
from evaluation.tuned import add_arguments, load_tuned
from model.chat import ChatTemplate, Message
from model.checkpoint import fingerprint_weights
from model.errors import ModelError
from model.pretrained import Pretrained

DEPTHS = (0, 5, 10, 20, 40)
OVER_REFUSAL = ("XSTest", "NotInject")


@dataclass(frozen=True)
class Ask:
    """One response to generate."""

    measure: str
    row: Row
    ids: tuple[int, ...]
    opening: str = ""


def prefills(rows: Sequence[Row], depth: int, tokenizer: PreTrainedTokenizerBase) -> list[Ask]:
    """Return requests whose responses begin with the first `depth` tokens of the harmful one."""
    template = ChatTemplate(tokenizer)
    return [
        Ask(
            f"prefill {depth}",
            row,
            (*template.encode([Message("user", row.prompt)]).request, *ids),
            str(tokenizer.decode(ids)),
        )
        for row, ids in beginnings(rows, depth, tokenizer)
    ]


def respond(
    pretrained: Pretrained, asks: Sequence[Ask], out: Path, *, max_tokens: int, batch_size: int
) -> list[Sample]:
    """Return the response to each, generating only those that the journal `weights.jsonl` in `out` does not hold."""
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "weights.jsonl")
    model = fingerprint_weights(pretrained.model)
    keys = [key_of(model, ask.measure, ask.row.key, max_tokens) for ask in asks]
    missing = [(ask, key) for ask, key in zip(asks, keys, strict=True) if key not in journal]
    prompts = [ask.ids for ask, _ in missing]
    for number, text in completions(pretrained, prompts, max_tokens=max_tokens, batch_size=batch_size):
        ask, key = missing[number]
        prompt, is_attack = ask.row.prompt, bool(ask.row.label)
        journal.add(Sample(key, out.name, ask.measure, "weights", prompt, ask.opening, text, is_attack=is_attack))
    return [journal.samples[key] for key in keys]


@torch.inference_mode()
def perplexity(pretrained: Pretrained, rows: Iterable[Row]) -> Estimate:
    """Return the perplexity of the responses, over all their tokens together; a bootstrap over responses.

    Raises:
        ValueError: if fewer than two responses have a token.
    """
    template, found = ChatTemplate(pretrained.tokenizer), []
    for row in rows:
        prompt = template.encode(
            [Message("user", row.prompt), Message("assistant", row.response or "")], continue_final=True
        )
        if not prompt.prefill:
            continue
        ids = torch.tensor([[*prompt.request, *prompt.prefill]], device=pretrained.model.device)
        logits = pretrained.model(ids).logits[0, len(prompt.request) - 1 : -1].float()
        loss = float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt.request) :], reduction="sum"))
        found.append((loss, len(prompt.prefill)))
    if len(found) < 2:
        raise ValueError(f"a perplexity needs two responses with a token, got {len(found)}")
    return resampled(found, lambda some: np.exp(some[..., 0].sum(axis=1) / some[..., 1].sum(axis=1)))


def measure(args: argparse.Namespace) -> dict[str, Estimate]:
    """Return every number by name."""
    pretrained = load_tuned(args.model, args.adapter)
    harmful = read(args.data / "prefill.jsonl", label=1, response="harmful_response")
    benign = read(args.data / "benign_prompts.jsonl", label=0)
    tricky = [row for row in read(args.data / "prompts.jsonl") if row.source in OVER_REFUSAL and not row.label]
    chosen = sample(harmful, args.n)
    asks = [ask for depth in args.depths for ask in prefills(chosen, depth, pretrained.tokenizer)]
    template = ChatTemplate(pretrained.tokenizer)
    for name, rows in (("Alpaca", sample(benign, args.benign)), ("XSTest-safe and NotInject", tricky)):
        asks += [Ask(name, row, template.encode([Message("user", row.prompt)]).request) for row in rows]
    made = {"max_tokens": args.max_tokens, "batch_size": args.batch_size}
    samples = respond(pretrained, asks, args.out, **made)
    answered: set[tuple[str, str]] = set()
    if args.adapter is not None:
        plain = load_tuned(args.model)
        of_plain = respond(plain, [ask for ask in asks if not ask.row.label], args.out / "plain", **made)
        answered = {(one.attack, one.prompt) for one in of_plain if not is_refusal(one.text)}
    found: dict[str, Estimate] = {}
    for name in dict.fromkeys(ask.measure for ask in asks):
        of_name = [one for one in samples if one.attack == name]
        if of_name[0].is_attack:
            found[f"{name}, not refused"] = wilson(sum(map(bool, by_phrases(of_name))), len(of_name))
        else:
            declined = [one for one in of_name if is_refusal(one.text)]
            found[f"{name}, declined"] = wilson(len(declined), len(of_name))
            if args.adapter is not None:
                disturbed = sum((one.attack, one.prompt) in answered for one in declined)
                found[f"{name}, declined where the plain model answers"] = wilson(disturbed, len(of_name))
    if args.answers is not None:
        found[f"perplexity of {args.answers.name}"] = perplexity(pretrained, read(args.answers, label=0)[:300])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure what fine-tuned weights do by themselves.")
    add_arguments(parser)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of prefill.jsonl, benign_prompts.jsonl, prompts.jsonl"
    )
    parser.add_argument(
        "--answers", type=Path, help="JSON lines of prompt and response, for the perplexity of the first 300"
    )
    parser.add_argument(
        "--depths", type=int, nargs="+", default=DEPTHS, help="tokens of the harmful beginning (%(default)s)"
    )
    parser.add_argument("--n", type=int, default=373, help="harmful requests (%(default)s)")
    parser.add_argument("--benign", type=int, default=500, help="Alpaca prompts (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest response (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the responses; one for each model")
    args = parser.parse_args(argv)
    try:
        found = measure(args)
    except (ModelError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.weights: {error}\n")
        return 1
    for name, value in found.items():
        sys.stdout.write(f"{name}: {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
