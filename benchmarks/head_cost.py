"""What the safety head costs per generated token: with and without it, paired in one run.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/head_cost.py --rounds 30

Each round decodes the same tokens twice over the same cache length, once with the head read at every
token and once without, in alternating order, and the ratio is taken round by round. The last line of
the output is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch

from model import checkpoint, pretrained
from model.chat import Message
from model.guarded_lm import GuardedLM
from model.safety_head import Passage

PROMPT = "Explain in a few sentences how a sailing boat can move against the wind, and what ballast is for."


def seconds_per_token(lm: GuardedLM, ids: tuple[int, ...], num_tokens: int, *, assess: bool) -> float:
    """Decode greedily after `ids` and return seconds per token, the prompt not counted."""
    cache, response = lm.new_cache(), Passage()
    output = lm.forward(ids, cache)
    start = time.perf_counter()
    for _ in range(num_tokens):
        output = lm.forward([int(output.logits.argmax())], cache, states_of_last=int(assess))
        if output.states is not None:
            lm.assess("response", response.extend(output.states))
    return (time.perf_counter() - start) / num_tokens


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=pretrained.DEFAULT_MODEL)
    parser.add_argument("--checkpoint", default=None, help="default: the shipped one of the model")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="tokens per round and side")
    args = parser.parse_args()
    folder = checkpoint.find(args.checkpoint or checkpoint.default_for(args.model) or "")
    lm = checkpoint.attach(pretrained.load(args.model, dtype=torch.bfloat16), folder)
    ids = lm.chat.encode([Message("user", PROMPT)]).request
    ratios, times = [], {True: [], False: []}
    for round_number in range(args.rounds + 2):
        order = (True, False) if round_number % 2 else (False, True)
        took = {assess: seconds_per_token(lm, ids, args.tokens, assess=assess) for assess in order}
        if round_number >= 2:  # two rounds of warm-up
            ratios.append(took[True] / took[False])
            for assess in order:
                times[assess].append(took[assess] * 1e3)
    low, middle, high = statistics.quantiles(ratios, n=4)
    result = {
        "rounds": args.rounds,
        "tokens_per_round": args.tokens,
        "threads": torch.get_num_threads(),
        "ms_per_token_with_head": round(statistics.median(times[True]), 3),
        "ms_per_token_without": round(statistics.median(times[False]), 3),
        "ratio_median": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
