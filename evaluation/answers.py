"""Answers of the served model to benign prompts: harmless text in the very style that is judged.

    python -m evaluation.answers --data data/eval/benign_prompts.jsonl --out answers.jsonl

Asks a running server, its policy only observing, at temperature 0.7. Each prompt has a seed of its own, so
no answer depends on another. An interrupted run goes on where it stopped: give each model a file of its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI, OpenAIError
from rich.progress import track

from evaluation import kept, lines
from evaluation.client import PARALLEL, add_arguments, connect
from evaluation.rows import Row, read, sample

SOURCE = "own answers"
TEMPERATURE = 0.7


def choose(rows: Sequence[Row], n: int) -> list[Row]:
    """Return the `n` rows whose hashes come first: a random sample of the prompts, and always the same.

    Raises:
        ValueError: if there are fewer different prompts.
    """
    chosen = sample(rows, n)
    if len(chosen) < n:
        raise ValueError(f"{n} answers need as many different prompts, got {len(chosen)}")
    return chosen


def ask(client: OpenAI, model: str, row: Row, max_tokens: int) -> str:
    """Return the answer of at most `max_tokens`, the same at every call; both sides of the policy only observe."""
    sides = {side: {"mode": "score"} for side in ("input", "output")}
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": row.prompt}],
        temperature=TEMPERATURE,
        max_tokens=max_tokens,
        seed=int(row.key[:8], 16),
        extra_body={"moderation": {"model": model, "policy": sides}},
    )
    return answer.choices[0].message.content or ""


def answer_all(client: OpenAI, model: str, rows: Sequence[Row], out: Path, *, max_tokens: int) -> int:
    """Append an answer to `out` for each row that it does not hold yet; return how many rows it holds.

    Empty answers are left out: there is nothing in them to judge.

    Raises:
        OpenAIError: if the server refuses a row or cannot be reached; what was answered is kept.
        ValueError: if `out` holds what is no answer.
    """
    lines.mend(out)
    done = {row.prompt for row in read(out, label=0)} if out.exists() and out.stat().st_size else set()
    missing = [row for row in rows if row.prompt not in done]
    answers = kept.as_found(lambda row: ask(client, model, row, max_tokens), missing, PARALLEL)
    with out.open("a", encoding="utf-8", buffering=1) as file:
        for row, text in track(answers, SOURCE, total=len(missing)):
            if text.strip():
                file.write(json.dumps({"prompt": row.prompt, "response": text, "source": SOURCE}) + "\n")
                done.add(row.prompt)
    return len(done)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Collect answers of a running server to benign prompts.")
    add_arguments(parser, key="that may loosen")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of benign prompts: prompt")
    parser.add_argument("--n", type=int, default=1000, help="how many answers (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer, in tokens (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="file of the answers, for evaluation.signal --answers")
    args = parser.parse_args(argv)
    try:
        rows = choose(read(args.data, label=0), args.n)
        client, model = connect(args.server, args.api_key)
        found = answer_all(client, model, rows, args.out, max_tokens=args.max_tokens)
    except (OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.answers: {error}\n")
        return 1
    sys.stdout.write(f"{found} answers in {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
