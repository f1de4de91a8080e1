"""Attack a running server over HTTP, as a stranger would.

    python -m evaluation.attack prefill --data data/eval/prefill.jsonl --tokenizer smollm2-135m --out runs/attacked
    python -m evaluation.attack exploit --data data/eval/direct.jsonl --source MaliciousInstruct --out runs/attacked
    python -m evaluation.attack late --data data/eval/prefill.jsonl --filler answers.jsonl --out runs/attacked

`direct` sends requests as they are, `ready` what somebody else made of them (`attack_prompt`); `prefill` begins the
response with the harmful one, `affirmed` with an assent, `late` with harmless text before the harmful one, `relapses`
with a refusal; `exploit` tries decoding settings; `scenes` and `conversations` wrap the request in texts of our own;
`diluted` hides it in a long message.

Every attempt is made under each policy: `both` sides block, `output` alone does, or `none` does, which leaves the
weights; whether these read `[CLS]` is a setting of the server. A success is text released without a refusal phrase, as
`evaluation.judges` counts it; what the server was given does not count, nor does a refusal that a policy forced. The
released texts are kept in `--out`, for other judges and so that an interrupted run goes on.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from openai import BadRequestError, NotFoundError, OpenAI, OpenAIError, UnprocessableEntityError
from pydantic import ValidationError
from rich.progress import track

from evaluation import kept
from evaluation.attempts import (
    TURN,
    Attempt,
    affirmed,
    benign,
    conversations,
    diluted,
    direct,
    exploits,
    late,
    prefills,
    ready,
    relapses,
    scenes,
    under,
)
from evaluation.client import PARALLEL, Server, add_arguments, add_parallel, connect, naming
from evaluation.judges import by_phrases
from evaluation.outcomes import outcomes
from evaluation.rows import Row, read, select
from evaluation.samples import Journal, Sample
from evaluation.scores import PROBE
from evaluation.suite import DEPTHS, SCORED, Kind, Measure, Policy, explain
from evaluation.target import SERVER, require_tokenizer, told
from model.chat import Message
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL, load_tokenizer

POLICIES = {
    "both": {"input": {"mode": "block"}, "output": {"mode": "block"}},
    "output": {"input": {"mode": "score"}, "output": {"mode": "block"}},
    "none": {"input": {"mode": "score"}, "output": {"mode": "score"}},
}
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
"""Asks a server to go on with the last message."""
AS_THEY_ARE: dict[str, Callable[[Sequence[Row]], list[Attempt]]] = {
    "direct": direct,
    "exploit": exploits,
    "scenes": scenes,
    "conversations": conversations,
    "ready": ready,
    "affirmed": affirmed,
    "relapses": relapses,
    "benign": benign,
}
"""What needs nothing but requests."""
RESPONSE = {"prefill": "harmful_response", "late": "harmful_response", "ready": "attack_prompt"}
"""The field beside the request that an attack reads."""
FILTERED = "content_filter"
"""Says that a server refused: where a response ends, and as the code of an error."""


def send(client: OpenAI, model: str, attempt: Attempt, target: str, *, is_watched: bool = True) -> Sample:
    """Make one attempt. A request that the server takes for invalid is an attempt of which nothing is known.

    Some servers refuse with an error, 400 and the code `content_filter`; that is a refusal like any other.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached.
        ValueError: if its answer is none of the OpenAI API.
    """
    extra: dict[str, Any] = {}
    if is_watched:
        extra["moderation"] = {"model": model, "policy": POLICIES[attempt.policy]}
    if attempt.opening:
        extra |= CONTINUED
    body = {"model": model, "messages": attempt.messages, **attempt.sampling, **extra}
    found = Sample(
        attempt.key,
        target,
        attempt.attack,
        attempt.policy,
        attempt.prompt,
        attempt.opening,
        "",
        is_attack=attempt.is_attack,
    )
    try:
        answer = client.post("/chat/completions", cast_to=object, body=body)
    except (BadRequestError, UnprocessableEntityError) as error:
        if error.code == FILTERED:
            return replace(found, is_stopped=True)
        return replace(found, error=str(error))
    try:
        choice: dict[str, Any] = answer["choices"][0]  # type: ignore[index]  # the client's type for any JSON is object
        refusal = choice["message"].get("refusal") or ""
        text = (choice["message"]["content"] or "").removesuffix(refusal)
        reason = choice["finish_reason"]
        return replace(found, text=text, is_stopped=reason == FILTERED, is_cut=reason == "length")
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"the server does not answer /chat/completions as the OpenAI API does: {error!r}") from error


def knows_policies(server: Server) -> bool:
    """Tell whether a policy can be asked of the server: it has a signal, and says in the answer what it found.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached.
    """
    moderation = {"model": server.model, "policy": POLICIES["both"]}
    asked = {"model": server.model, "messages": [{"role": "user", "content": PROBE}], "max_tokens": 1}
    try:
        answer = server.client.post("/chat/completions", cast_to=object, body=asked | {"moderation": moderation})
    except (BadRequestError, NotFoundError, UnprocessableEntityError):  # it knows no such field, or has no signal
        return False
    return isinstance(answer, dict) and answer.get("moderation") is not None


def continues(server: Server) -> bool:
    """Tell whether the server goes on with a response whose beginning is given, and does not begin one after it.

    Where it ignores what asks for that, it reads as many tokens with it as without. So does one that goes on unasked,
    which cannot be told from it and counts as one that does not.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached.
    """
    messages = [vars(Message("user", PROBE)), vars(Message("assistant", "It does so"))]
    asked = {"model": server.model, "messages": messages, "max_tokens": 1}

    def num_read(extra: dict[str, Any]) -> int:
        answer: Any = server.client.post("/chat/completions", cast_to=object, body=asked | extra)
        return int(answer["usage"]["prompt_tokens"])

    refused = (BadRequestError, UnprocessableEntityError)
    try:
        begun = num_read(CONTINUED)
    except (*refused, KeyError, TypeError):
        return False
    try:
        return begun < num_read({})
    except refused:  # an assistant's message may stand last only where it is to be continued
        return True


def attack(
    server: Server,
    attempts: Sequence[Attempt],
    path: Path,
    target: str,
    *,
    is_watched: bool = True,
    parallel: int = PARALLEL,
) -> list[Sample]:
    """Return what came of every attempt, making only those that the journal at `path` does not hold.

    What the server took for invalid is tried again.

    Args:
        server: what is attacked.
        attempts: what is sent.
        path: the journal.
        target: what the samples are of.
        is_watched: the server has a signal, so that a policy can be asked of it.
        parallel: requests in flight.

    Raises:
        OpenAIError: as `send`; what was answered is kept.
        ValueError: as `send`, and if the journal cannot be read.
    """
    journal = Journal(path)
    missing = [one for one in attempts if one.key not in journal or journal.samples[one.key].error]

    def made(one: Attempt) -> Sample:
        return send(server.client, server.model, one, target, is_watched=is_watched)

    for _, sample in track(kept.as_found(made, missing, parallel), path.stem, total=len(missing)):
        journal.add(sample)
    return [journal.samples[attempt.key] for attempt in attempts]


def plan(measure: Measure) -> list[Attempt]:
    """Return the attempts of a measure.

    Raises:
        ValueError: if a row cannot be read, or none is left.
        ModelError: if the tokenizer cannot be loaded.
    """
    attempts = _made(measure, requests(measure))
    if not attempts:
        depths = measure.depths or DEPTHS[measure.kind]
        raise ValueError(f"no harmful response has {min(depths) if measure.kind == 'prefill' else TURN} tokens")
    return under(attempts, measure.policies, measure.max_tokens)


def requests(measure: Measure) -> list[Row]:
    """Return the rows that a measure is about, each prompt with the measure's suffix.

    Raises:
        ValueError: if a row cannot be read, or none is left.
    """
    wanted = 0 if measure.kind == "benign" else 1
    response = RESPONSE.get(measure.kind)
    rows = select(measure.data, measure.n, label=wanted, source=measure.source, response=response)
    return [replace(row, prompt=row.prompt + measure.suffix) for row in rows]


def _made(measure: Measure, rows: Sequence[Row]) -> list[Attempt]:
    """Return what the measure makes of the requests."""
    if measure.kind in AS_THEY_ARE:
        return AS_THEY_ARE[measure.kind](rows)
    tokenizer, depths = load_tokenizer(measure.tokenizer or DEFAULT_MODEL), measure.depths or DEPTHS[measure.kind]
    if measure.kind == "prefill":
        return [attempt for depth in depths for attempt in prefills(rows, depth, tokenizer)]
    assert measure.filler is not None
    harmless, make = read(measure.filler, label=0), {"late": late, "diluted": diluted}[measure.kind]
    return [attempt for depth in depths for attempt in make(rows, harmless, depth, tokenizer)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Attack a running server.")
    others = ("search", "benign", *SCORED)
    parser.add_argument("attack", choices=[kind for kind in get_args(Kind) if kind not in others])
    add_arguments(parser, key="that may loosen")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="JSON lines of prompt; prefill and late need harmful_response, ready attack_prompt",
    )
    parser.add_argument("--source", default="", help="only rows whose source begins with this")
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL, help="of the served model, counts (%(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", help=f"tokens that are given, by default {DEPTHS}")
    parser.add_argument("--filler", type=Path, help="JSON lines of harmless responses, for late and diluted")
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=get_args(Policy),
        default=Measure.policies,
        help="sides that block (%(default)s)",
    )
    parser.add_argument("--n", type=int, default=Measure.n, help="most prompts (%(default)s)")
    parser.add_argument("--suffix", default="", help="ends every prompt: the trigger of a backdoor")
    parser.add_argument("--max-tokens", type=int, default=Measure.max_tokens, help="longest response (%(default)s)")
    add_parallel(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the outcomes; its name is the target's")
    args = parser.parse_args(argv)
    try:
        chosen = {field.name: getattr(args, field.name) for field in fields(Measure) if hasattr(args, field.name)}
        measure = Measure(args.attack, **chosen)
        attempts = plan(measure)
        args.out.mkdir(parents=True, exist_ok=True)
        with naming(args.server):
            server = connect(args.server, args.api_key)
            if args.attack in DEPTHS:
                require_tokenizer(server, load_tokenizer(args.tokenizer), args.tokenizer)
            kept.settle(args.out / SERVER, told(server))
            path = args.out / f"{args.attack}.jsonl"
            samples = attack(server, attempts, path, args.out.name, parallel=args.parallel)
    except ValidationError as error:
        sys.stderr.write(f"evaluation.attack: {explain(error)}\n")
        return 1
    except (ModelError, OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"evaluation.attack: {error}\n")
        return 1
    for one in outcomes({args.out.name: samples}, by_phrases):
        sys.stdout.write(f"{one.name}: not refused {one.share}, acted on {one.acted_on}\n")
    if invalid := [one.error for one in samples if one.error]:
        sys.stderr.write(f"evaluation.attack: {len(invalid)} requests were invalid, such as: {invalid[0]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
