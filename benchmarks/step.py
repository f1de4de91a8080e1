"""What a step of the engine costs with each kind of signal, and where its time goes: one process, without HTTP.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/step.py --rows 1 8 32

A model of the default's shape with random weights writes answers of so many sequences together. The variants take
turns, forwards and backwards, so that what else the machine does meets all of them; ratios are to the first, round by
round. `off` appears twice by default: what it differs from itself is the noise, of the machine and of where in memory
weights lie. The parts of a step are timed in rounds of their own, as timers cost time too. The last line of the output
is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any
from unittest.mock import patch

from shape import PROMPT, guarded, made_model, made_tokenizer
from shape import VARIANTS as OF_SHAPE

from model import generation
from model.chat import Message
from model.config import BaseModel
from model.generation import Generation
from model.guarded_lm import GuardedLM
from model.holdback import Holdback
from model.passes import Pass, Passed
from model.policy import Mode, Policy
from model.request import GenerationRequest
from model.sampling import SamplingParams
from model.trace import Trace
from server.engine import assessing
from server.engine.paged import paged
from server.engine.runner import PagedRunner

AGAIN = "off again"
VARIANTS = (*OF_SHAPE, AGAIN)
WARM_UP = 8
"""Steps of an answer that do not count: those that read the prompts are among them."""
CACHE_BYTES = 400 << 20
NUMBERS = count(1_000_000)
"""Begin the prompts, so that they share nothing. Without a signal they would share whatever they begin with."""
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "pass": ((PagedRunner, "_forward"),),
    "heads": ((GuardedLM, "assess"), (GuardedLM, "assess_cls"), (assessing, "extend_rows")),
    "sampling": ((generation, "draw"), (assessing, "likeliest")),
    "text": ((Holdback, "push"), (Holdback, "release")),
    "policy": ((Policy, "decide"), (Trace, "add")),
}
"""What is timed; the rest of a step is the Python between them."""


def answer(lm: GuardedLM, runner: PagedRunner, rows: int, tokens: int, ended: Callable[[], None]) -> None:
    """Have so many sequences write so many tokens together; `ended` is called after every step."""
    mode = Mode.OFF if lm.config is None else Mode.BLOCK
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    prompts = [lm.chat.encode([Message("user", f"{next(NUMBERS)}: {PROMPT}")]) for _ in range(rows)]
    asked = [GenerationRequest(prompt, tokens, sampling, input=mode, output=mode) for prompt in prompts]
    steps = [Generation(lm, one, lm.schedule).run() for one in asked]
    seats = [runner.open(prompt, watches_request=mode is not Mode.OFF) for prompt in prompts]

    def go_on(number: int, passed: Passed | None) -> Pass | None:
        try:
            item = next(steps[number]) if passed is None else steps[number].send(passed)
            while not isinstance(item, Pass):
                item = next(steps[number])
            return item
        except StopIteration:
            return None

    waiting = {number: go_on(number, None) for number in range(rows)}
    while live := {number: one for number, one in waiting.items() if one is not None}:
        passes = {number: runner.next_pass(seats[number], one) for number, one in live.items()}
        for number, one in passes.items():
            runner.size_of(seats[number], one)  # as the scheduler is told
        results = runner.run([(seats[number], one) for number, one in passes.items()])
        for (number, one), passed in zip(passes.items(), results, strict=True):
            if isinstance(passed, Exception):
                raise passed
            if one is live[number]:
                waiting[number] = go_on(number, passed)
        ended()
    for seat in seats:
        runner.close(seat)


def step_ms(lm: GuardedLM, runner: PagedRunner, rows: int, tokens: int) -> float:
    """Return the mean of the steps of one round: on a schedule they are not alike."""
    ends: list[float] = []
    answer(lm, runner, rows, tokens, lambda: ends.append(time.perf_counter()))
    return 1e3 * (ends[-1] - ends[WARM_UP]) / (len(ends) - 1 - WARM_UP)


@contextmanager
def timers(spent: Counter[str]) -> Iterator[None]:
    """Add to `spent` what each part takes."""

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - start

        return run

    with ExitStack() as stack:
        for part, places in PARTS.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
        yield


def parts_ms(lm: GuardedLM, runner: PagedRunner, rows: int, tokens: int) -> dict[str, float]:
    """Return the mean of each part over the steps of one round, and that of all the rest."""
    found: list[dict[str, float]] = []
    spent: Counter[str] = Counter()
    last = time.perf_counter()

    def ended() -> None:
        nonlocal last
        now = time.perf_counter()
        found.append({**{part: spent[part] for part in PARTS}, "rest": now - last - sum(spent.values())})
        spent.clear()
        last = now

    with timers(spent):
        answer(lm, runner, rows, tokens, ended)
    return {part: 1e3 * statistics.fmean(one[part] for one in found[WARM_UP:]) for part in (*PARTS, "rest")}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="sequences at a time (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=40, help="of each answer (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    args = parser.parse_args()
    shape = argparse.Namespace(width=576, inner=1536, layers=30, heads=9, key_heads=3, vocabulary=49_152)
    made: dict[str, tuple[GuardedLM, PagedRunner]] = {}
    for name in args.variants:
        lm = guarded(
            made_model(shape, "cpu"),
            made_tokenizer(shape.vocabulary),
            name.replace(AGAIN, "off"),
            BaseModel("r", "", "", "bfloat16"),
        )
        runner = paged(lm, CACHE_BYTES, compiles=True)
        if not isinstance(runner, PagedRunner):
            raise SystemExit("the engine does not run this model's sequences together")
        made[name] = lm, runner
    found: dict[int, Any] = {}
    for rows in args.rows:
        for lm, runner in made.values():
            answer(lm, runner, rows, 20, lambda: None)
        rounds: dict[str, list[float]] = {name: [] for name in made}
        for number in range(args.rounds):
            for name in list(made)[:: 1 if number % 2 == 0 else -1]:
                rounds[name].append(step_ms(*made[name], rows, args.tokens))
        first = rounds[args.variants[0]]
        found[rows] = {}
        for name, values in rounds.items():
            ratios = sorted(value / base for value, base in zip(values, first, strict=True))
            parts = parts_ms(*made[name], rows, args.tokens)
            quartiles = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
            one = {"ms": statistics.median(values), "ratio": statistics.median(ratios), "quartiles": quartiles}
            found[rows][name] = one | {"parts": parts}
            shown = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
            ratio = f"{one['ratio']:.3f} ({quartiles[0]:.3f} to {quartiles[1]:.3f})"
            sys.stderr.write(f"{rows} rows, {name}: {one['ms']:.2f} ms, ratio {ratio}; {shown}\n")
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
