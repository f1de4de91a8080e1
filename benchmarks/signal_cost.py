"""What the safety signal costs per generated token: each kind of it against none, paired in one run.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/signal_cost.py --rounds 20

Each round decodes the same number of tokens with every variant, in an order that changes from round to round, and
ratios are taken round by round. A checkpoint without `[CLS]` gets an untrained one: what it costs does not depend on
its weights. The last line of the output is one JSON object.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

import torch
from rich.progress import track

from model import checkpoint, pretrained
from model.chat import EncodedPrompt, Message
from model.cls_signal import ClsSignal
from model.config import ClsConfig
from model.guarded_lm import GuardedLM
from model.passes import Solo
from model.reader import Reader

PROMPT = "Explain in a few sentences how a sailing boat can move against the wind, and what ballast is for."
NONE = "none"


def variants(lm: GuardedLM) -> dict[str, GuardedLM]:
    """Return the model of a checkpoint with every kind of signal, and with none."""
    assert lm.config is not None
    model, tokenizer, head = lm.model, lm.tokenizer, lm.head
    cls = lm.cls or ClsSignal(int(model.config.get_text_config().hidden_size))
    both = replace(lm.config, cls=lm.config.cls or ClsConfig())
    alone = replace(both, token_head=None)
    found = {NONE: GuardedLM(model, tokenizer)}
    if head is not None:
        found["token head"] = GuardedLM(model, tokenizer, head, replace(both, cls=None))
        found["token head, [CLS] annealed"] = GuardedLM(model, tokenizer, head, both, cls, schedule="annealed")
    for schedule in ("every", "annealed"):
        found[f"[CLS] {schedule}"] = GuardedLM(model, tokenizer, None, alone, cls, schedule=schedule)
    return found


def seconds_per_token(lm: GuardedLM, prompt: EncodedPrompt, num_tokens: int) -> float:
    """Decode greedily after `prompt` and return seconds per token, the prompt not counted."""
    is_watched = lm.config is not None
    solo = Solo(lm, prompt)
    reader = Reader(lm, prompt, lm.schedule, watches_request=is_watched, watches_response=is_watched)
    step = solo.complete(reader.feed(prompt.request))
    start = time.perf_counter()
    for _ in range(num_tokens):
        step = solo.complete(reader.feed([int(step.logits.argmax())]))
    return (time.perf_counter() - start) / num_tokens


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=pretrained.DEFAULT_MODEL)
    parser.add_argument("--checkpoint", default=None, help="default: the shipped one of the model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per round and variant (%(default)s)")
    args = parser.parse_args()
    folder = checkpoint.find(args.checkpoint or checkpoint.default_for(args.model) or "")
    found = variants(checkpoint.attach(pretrained.load(args.model, dtype=torch.bfloat16), folder))
    prompt = next(iter(found.values())).chat.encode([Message("user", PROMPT)])
    names = list(found)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in track(range(args.rounds + 1), "rounds"):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken = seconds_per_token(found[name], prompt, args.tokens)
            if number:  # the first round warms up
                times[name].append(taken)
    result = {
        "rounds": args.rounds,
        "tokens_per_round": args.tokens,
        "threads": torch.get_num_threads(),
        "ms_per_token": {name: round(statistics.median(times[name]) * 1e3, 3) for name in names},
        "ratio_quartiles": {
            name: [round(value, 4) for value in statistics.quantiles(_ratios(times[name], times[NONE]), n=4)]
            for name in names
            if name != NONE
        },
    }
    print(json.dumps(result))


def _ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


if __name__ == "__main__":
    main()
