"""How well do weights, or a server that runs, do a task? SQL from questions, sums in words.

    python -m evaluation.tasks --task sql --adapter runs/constrained_sql/adapter --data data/finetune/sql_test.jsonl
    python -m evaluation.tasks --task sql --server http://127.0.0.1:8000 --data data/finetune/sql_test.jsonl

Everything is greedy. Of weights nothing acts, and `[CLS]` is not read; a server acts as it does, and a refusal is an
answer like any other. As arXiv 2406.05946 scores them (appendix D): SQL by ROUGE-1, GSM8K by the number after "####";
besides, SQL by exact match.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from openai import BadRequestError, OpenAIError
from openai.types.chat import ChatCompletionMessageParam
from rich.progress import track

from evaluation import kept
from evaluation.attack import FILTERED
from evaluation.client import PARALLEL, Server, connect
from evaluation.completions import completions
from evaluation.intervals import Estimate, mean
from evaluation.rows import Row, read
from evaluation.tuned import add_arguments, load_tuned
from model.chat import ChatTemplate, Message
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL, Pretrained

Score = Callable[[str, str], float]
NUM_ROWS = 500


def rouge_1(answer: str, reference: str) -> float:
    """Return the F1 of the words of two texts, each as often as it stands there (Lin 2004), in [0, 1]."""
    ours, theirs = (Counter(re.findall("[a-z0-9]+", text.lower())) for text in (answer, reference))
    return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())


def same_query(answer: str, reference: str) -> float:
    """Return 1 for the same text, but for white space and a last semicolon."""
    ours, theirs = (" ".join(text.split()).removesuffix(";").rstrip() for text in (answer, reference))
    return float(ours == theirs)


def same_number(answer: str, reference: str) -> float:
    """Return 1 for the same number after the first "####", commas left out; 0 where the answer has none."""
    ours, theirs = _number(answer), _number(reference)
    return float(ours is not None and ours == theirs)


def _number(text: str) -> float | None:
    found = re.search(r"####\s*(-?[\d,]*\.?\d+)", text)
    return float(found[1].replace(",", "")) if found else None


class Task(NamedTuple):
    """What a task is scored by."""

    scores: Mapping[str, Score]
    max_tokens: int
    """Longest answer: few references are longer."""


TASKS: Mapping[str, Task] = {
    "sql": Task({"ROUGE-1": rouge_1, "exact match": same_query}, 128),
    "gsm8k": Task({"accuracy": same_number}, 320),
}


def answer(pretrained: Pretrained, rows: Sequence[Row], *, max_tokens: int, batch_size: int) -> list[str]:
    """Return the greedy answer to each prompt."""
    template = ChatTemplate(pretrained.tokenizer)
    prompts = [template.encode([Message("user", row.prompt)]).request for row in rows]
    found = dict(completions(pretrained, prompts, max_tokens=max_tokens, batch_size=batch_size))
    return [found[number] for number in range(len(rows))]


def served(server: Server, rows: Sequence[Row], max_tokens: int) -> list[str]:
    """Return the greedy answer of a running server to each prompt; a refusal by an error is an answer without text.

    Raises:
        OpenAIError: if it refuses the key, takes a prompt for invalid, or cannot be reached.
    """
    create = server.client.chat.completions.create

    def ask(row: Row) -> str:
        turns: list[ChatCompletionMessageParam] = [{"role": "user", "content": row.prompt}]
        try:
            found = create(model=server.model, messages=turns, max_tokens=max_tokens, temperature=0)
        except BadRequestError as error:
            if error.code == FILTERED:
                return ""
            raise
        return found.choices[0].message.content or ""

    found = dict(track(kept.as_found(ask, rows, PARALLEL), "answers", total=len(rows)))
    return [found[row] for row in rows]


def check(task: str, rows: Sequence[Row]) -> None:
    """Raise a ValueError unless every reference is right by its own scores."""
    for name, score in TASKS[task].scores.items():
        for number, row in enumerate(rows, start=1):
            if score(row.response or "", row.response or "") != 1.0:
                raise ValueError(f"row {number} has no reference for {name}")


def measure(task: str, answers: Sequence[str], rows: Sequence[Row]) -> dict[str, Estimate]:
    """Return the mean of every score of a task."""
    references = [row.response or "" for row in rows]
    return {
        name: mean([score(one, other) for one, other in zip(answers, references, strict=True)])
        for name, score in TASKS[task].scores.items()
    }


def of_tuned(
    task: str,
    model: str,
    adapter: Path | None,
    data: Path,
    *,
    n: int = NUM_ROWS,
    max_tokens: int | None = None,
    batch_size: int = 32,
) -> dict[str, Estimate]:
    """Return every score of a task of a model with its adapter.

    Args:
        task: one of `TASKS`.
        model: the model.
        adapter: folder of its adapter, or None.
        data: JSON lines of prompt and response.
        n: most rows.
        max_tokens: of the longest answer; None takes the task's.
        batch_size: answers at a time.

    Raises:
        ModelError: if model or adapter cannot be loaded.
        OSError: if the data cannot be read.
        ValueError: if a row or its reference is not one of the task.
    """
    rows = rows_of(task, data, n)
    most = max_tokens or TASKS[task].max_tokens
    return measure(task, answer(load_tuned(model, adapter), rows, max_tokens=most, batch_size=batch_size), rows)


def rows_of(task: str, data: Path, n: int) -> list[Row]:
    """Return the first `n` rows of a task.

    Raises:
        OSError: if the data cannot be read.
        ValueError: if a row or its reference is not one of the task.
    """
    rows = read(data, label=0)[:n]
    check(task, rows)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Score fine-tuned weights, or a running server, on a task.")
    parser.add_argument("--task", choices=TASKS, required=True)
    add_arguments(parser)
    parser.add_argument("--server", metavar="ADDRESS", help="that is asked, instead of --model and --adapter")
    parser.add_argument("--api-key", default="none", help="where the server asks for one")
    parser.add_argument("--data", type=Path, required=True, help="JSON lines of prompt and response")
    parser.add_argument("--n", type=int, default=NUM_ROWS, help="most rows (%(default)s)")
    parser.add_argument("--max-tokens", type=int, help="longest answer (128 for sql, 320 for gsm8k)")
    args = parser.parse_args(argv)
    if args.server and (args.adapter or args.model != DEFAULT_MODEL):
        parser.error("a server has weights of its own: leave out --model and --adapter")
    try:
        if args.server:
            rows = rows_of(args.task, args.data, args.n)
            most = args.max_tokens or TASKS[args.task].max_tokens
            found = measure(args.task, served(connect(args.server, args.api_key), rows, most), rows)
        else:
            found = of_tuned(
                args.task,
                args.model,
                args.adapter,
                args.data,
                n=args.n,
                max_tokens=args.max_tokens,
                batch_size=args.batch_size,
            )
    except OpenAIError as error:
        sys.stderr.write(f"evaluation.tasks: {args.server}: {error}\n")
        return 1
    except (ModelError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.tasks: {error}\n")
        return 1
    for name, value in found.items():
        sys.stdout.write(f"{name}: {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
