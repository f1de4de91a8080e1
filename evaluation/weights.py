"""What the weights alone do: refusals after harmful beginnings, benign prompts declined, perplexity. Nothing acts.

    python -m evaluation.weights --model smollm2-135m --adapter runs/deepened/adapter --data data/eval --out runs/w

Everything is greedy and in batches; `[CLS]` is not read. A response counts as a refusal where it holds a refusal
phrase, so "not refused" is an upper bound of attack success: text that neither refuses nor harms counts too.
The responses are kept in `--out`, for other judges and so that an interrupted run goes on.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from evaluation.intervals import Estimate, wilson
from evaluation.judges import is_refusal
from evaluation.rows import Row, read
from evaluation.samples import Journal, Sample, key_of
from model import adapter
from model.chat import ChatTemplate, Message
from model.completion import complete
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL, Pretrained, device_of, load

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
    """Return requests whose responses begin with the first `depth` tokens of the harmful one.

    Rows whose harmful response is shorter are left out.
    """
    template, found = ChatTemplate(tokenizer), []
    for row in rows:
        request = template.encode([Message("user", row.prompt)]).request
        given = tokenizer.encode(row.response or "", add_special_tokens=False)[:depth]
        if len(given) == depth:
            found.append(Ask(f"prefill {depth}", row, (*request, *given), str(tokenizer.decode(given))))
    return found


def respond(
    pretrained: Pretrained, asks: Sequence[Ask], out: Path, *, max_tokens: int, batch_size: int
) -> list[Sample]:
    """Return the response to each, generating only those that the journal at `out` does not hold."""
    journal = Journal(out)
    keys = [key_of(ask.measure, ask.row.key, max_tokens) for ask in asks]
    missing = sorted(
        ((ask, key) for ask, key in zip(asks, keys, strict=True) if key not in journal), key=lambda one: len(one[0].ids)
    )
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    for batch in track(batches, "responses"):
        made = complete(pretrained, [ask.ids for ask, _ in batch], max_tokens)
        texts = pretrained.tokenizer.batch_decode(made, skip_special_tokens=True)
        for (ask, key), text in zip(batch, texts, strict=True):
            journal.add(Sample(key, ask.measure, "weights", ask.row.prompt, ask.opening, text))
    return [journal.samples[key] for key in keys]


@torch.inference_mode()
def perplexity(pretrained: Pretrained, rows: Iterable[Row]) -> float:
    """Return the perplexity of the responses, over all their tokens together.

    Raises:
        ValueError: if there is no token.
    """
    template, total, count = ChatTemplate(pretrained.tokenizer), 0.0, 0
    for row in rows:
        prompt = template.encode(
            [Message("user", row.prompt), Message("assistant", row.response or "")], continue_final=True
        )
        if not prompt.prefill:
            continue
        ids = torch.tensor([[*prompt.request, *prompt.prefill]], device=pretrained.model.device)
        logits = pretrained.model(ids).logits[0, len(prompt.request) - 1 : -1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt.request) :], reduction="sum"))
        count += len(prompt.prefill)
    if not count:
        raise ValueError("no response has a token")
    return math.exp(total / count)


def measure(pretrained: Pretrained, args: argparse.Namespace) -> dict[str, Estimate | float]:
    """Return every number by name."""
    harmful = [
        Row(row["source"], row["prompt"], row["harmful_response"], 1) for row in _lines(args.data / "prefill.jsonl")
    ]
    benign = read(args.data / "benign_prompts.jsonl", label=0)
    tricky = [row for row in read(args.data / "prompts.jsonl") if row.source in OVER_REFUSAL and not row.label]
    chosen = _sample(harmful, args.n)
    asks = [ask for depth in args.depths for ask in prefills(chosen, depth, pretrained.tokenizer)]
    template = ChatTemplate(pretrained.tokenizer)
    for name, rows in (("Alpaca", _sample(benign, args.benign)), ("XSTest-safe and NotInject", tricky)):
        asks += [Ask(name, row, template.encode([Message("user", row.prompt)]).request) for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    samples = respond(
        pretrained, asks, args.out / "weights.jsonl", max_tokens=args.max_tokens, batch_size=args.batch_size
    )
    found: dict[str, Estimate | float] = {}
    for name in dict.fromkeys(ask.measure for ask in asks):
        refusals = [is_refusal(sample.text) for sample in samples if sample.attack == name]
        is_attack = name.startswith("prefill")
        label = f"{name}, not refused" if is_attack else f"{name}, declined"
        found[label] = wilson(sum(one != is_attack for one in refusals), len(refusals))
    if args.answers is not None:
        answers = read(args.answers, label=0)
        found[f"perplexity of {args.answers.name}, n = {min(300, len(answers))}"] = perplexity(
            pretrained, answers[:300]
        )
    return found


def _sample(rows: Sequence[Row], n: int) -> list[Row]:
    """Return the `n` rows whose hashes come first, or all."""
    return sorted({row.key: row for row in rows}.values(), key=lambda row: row.key)[:n]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure what fine-tuned weights do by themselves.")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="short name, folder or Hub id (%(default)s)")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter to add")
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
    parser.add_argument("--batch-size", type=int, default=32, help="responses at a time (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the responses; one for each model")
    args = parser.parse_args(argv)
    try:
        pretrained = load(args.model, dtype=torch.bfloat16, device=device_of("auto"))
        if args.adapter is not None:
            pretrained = adapter.merge(pretrained, args.adapter)
        found = measure(pretrained, args)
    except (ModelError, OSError, KeyError, ValueError) as error:
        sys.stderr.write(f"evaluation.weights: {error}\n")
        return 1
    for name, value in found.items():
        sys.stdout.write(f"{name}: {value if isinstance(value, Estimate) else f'{value:.2f}'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
