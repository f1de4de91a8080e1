"""How well a model expects given responses with the weights as they are and rounded to 8 bits, paired in one run.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/perplexity.py --data data/train/instructions.jsonl --rows 300

Both go through the engine's own packed products; the rest of the model is plain. Every response stands after its
prompt in the chat template, and only its tokens count. The ratio of perplexities has a 95 % interval from resampling
the responses. The last line of the output is one JSON object.
"""

import argparse
import json
import math
from itertools import islice
from pathlib import Path

import torch
from rich.progress import track

from model import pretrained
from model.chat import ChatTemplate, EncodedPrompt, Message
from server.engine.packed import pack

RESAMPLES = 2000


def prompts(path: Path, template: ChatTemplate, num_rows: int) -> list[EncodedPrompt]:
    """Return the first rows of a file, JSON lines with `prompt` and `response`, as conversations."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, num_rows)]
    return [
        template.encode([Message("user", row["prompt"]), Message("assistant", row["response"])], continue_final=True)
        for row in rows
    ]


@torch.inference_mode()
def losses(name: str, found: list[EncodedPrompt], *, is_int8: bool) -> list[float]:
    """Return the sum of the losses of each response's tokens, in nats."""
    model = pretrained.load(name, dtype=torch.bfloat16).model
    few = torch.tensor([found[0].request])
    pack(model, lambda: model(few), is_int8=is_int8)
    sums = []
    for one in track(found, "int8" if is_int8 else "bfloat16"):
        logits = model(torch.tensor([one.request + one.prefill])).logits[0, len(one.request) - 1 : -1]
        sums.append(
            float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(one.prefill), reduction="sum"))
        )
    return sums


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=pretrained.DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, required=True, help="JSON lines with prompt and response")
    parser.add_argument("--rows", type=int, default=300, help="the first of them (%(default)s)")
    args = parser.parse_args()
    found = prompts(args.data, ChatTemplate(pretrained.load_tokenizer(args.model)), args.rows)
    lengths = torch.tensor([float(len(one.prefill)) for one in found])
    both = torch.tensor([losses(args.model, found, is_int8=is_int8) for is_int8 in (False, True)])  # (2, N)
    drawn = torch.randint(len(found), (RESAMPLES, len(found)), generator=torch.Generator().manual_seed(0))
    resampled = ((both[1] - both[0])[drawn].sum(1) / lengths[drawn].sum(1)).exp()
    perplexities = (both.sum(1) / lengths.sum()).exp().tolist()
    result = {
        "responses": len(found),
        "tokens": int(lengths.sum()),
        "perplexity": {name: round(value, 4) for name, value in zip(("bfloat16", "int8"), perplexities, strict=True)},
        "ratio": round(math.exp(float((both[1] - both[0]).sum() / lengths.sum())), 5),
        "interval": [round(value, 5) for value in resampled.quantile(torch.tensor([0.025, 0.975])).tolist()],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
