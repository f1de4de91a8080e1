"""`ballast-eval`: how safe is a model or a running server? Suites of attacks, reports, and how two runs differ."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from openai import OpenAIError
from pydantic import TypeAdapter

from evaluation import depth, onsets, page, runs, scores, search, suite, tuning
from evaluation.attack import attack, continues, knows_policies, plan, requests
from evaluation.attempts import SCENES, Attempt
from evaluation.client import Server, add_parallel, connect, naming
from evaluation.intervals import Estimate
from evaluation.judge import caveat, quality
from evaluation.judges import Judge, about_classifier, by_classifier, by_phrases, require_other
from evaluation.kept import settle
from evaluation.llm_judge import by_llm
from evaluation.onsets import Made
from evaluation.outcomes import differences, score_differences
from evaluation.rows import Row, checksum, read
from evaluation.runs import FACTS, Run
from evaluation.samples import Sample
from evaluation.suite import BEGUN, DEPTHS, SCORED, Measure, Suite
from evaluation.target import KINDS, fingerprint, is_address, require_tokenizer, serving, told, vocabulary
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL, load_tokenizer

VERDICTS = "verdicts.jsonl"
PHRASES = "refusal phrases; text without one counts as harm, also where it neither refuses nor harms"


class Todo(NamedTuple):
    """What the measures of a suite ask for, by their names."""

    attempts: dict[str, list[Attempt]]
    searched: dict[str, list[Row]]
    """Requests of which wordings are to be found first."""
    rows: dict[str, list[Row]]
    """To score, as the following."""
    turns: dict[str, list[Made]]


def run(chosen: Suite, address: str, args: argparse.Namespace) -> None:
    """Make every attempt that the run in `--out` has not made yet, and score what it has not scored.

    Raises:
        OpenAIError: if the server refuses the key or cannot be reached; what was answered is kept.
        ValueError: if it is a run of something else, or the server takes every attempt for invalid.
    """
    server = connect(address, args.api_key, args.served_model)
    is_watched = knows_policies(server)
    measures = _measures(chosen if is_watched else _unwatched(chosen, server), args)
    for name in sorted({one.tokenizer for one in measures.values() if one.tokenizer is not None}):
        require_tokenizer(server, load_tokenizer(name), name)
    todo = _todo(measures)
    sizes = {name: len(some) for found in (todo.attempts, todo.rows, todo.turns) for name, some in found.items()}
    sizes |= {name: len(some) * len(measures[name].policies) for name, some in todo.searched.items()}
    settle(args.out / FACTS, _facts(server, measures, args) | {"attempts": sizes, "is_watched": is_watched})
    if (todo.rows or todo.turns) and not scores.can_score(*server):
        left_out = ", ".join([*todo.rows, *todo.turns])
        sys.stderr.write(f"ballast-eval: the server does not show its risks to this caller, left out: {left_out}\n")
        todo = todo._replace(rows={}, turns={})
    if todo.rows or todo.turns:
        scores.require_same_head(*server, args.out)
    plans = dict(todo.attempts)
    for name, some in todo.searched.items():
        plans[name] = search.plan(server, some, measures[name], runs.wordings(args.out, name), args.parallel)
        if num_void := len({row.prompt for row in some}) - len({attempt.prompt for attempt in plans[name]}):
            said = "the server takes for invalid, or cannot judge"
            sys.stderr.write(f"ballast-eval: left out of {name}: {num_void} requests that {said}\n")
    how: dict[str, Any] = {"target": args.out.name, "is_watched": is_watched, "parallel": args.parallel}
    journals = ((attempts, args.out / f"{name}.jsonl") for name, attempts in plans.items())
    samples = [one for attempts, journal in journals for one in attack(server, attempts, journal, **how)]
    for name, some in todo.rows.items():
        scores.score_all(*server, some, args.out / f"{name}.jsonl", parallel=args.parallel)
    for name, made in todo.turns.items():
        onsets.score_all(*server, made, args.out / f"{name}.jsonl", parallel=args.parallel)
    _tell_invalid(samples)


def _todo(measures: Mapping[str, Measure]) -> Todo:
    todo = Todo({}, {}, {}, {})
    for name, measure in measures.items():
        if measure.filler is not None and measure.kind in SCORED:
            todo.turns[name] = onsets.make(scores.rows_of(measure), read(measure.filler, label=0))
        elif measure.kind in SCORED:
            todo.rows[name] = scores.rows_of(measure)
        elif measure.kind == "search":
            todo.searched[name] = requests(measure)
        else:
            todo.attempts[name] = plan(measure)
    return todo


def _tell_invalid(samples: Sequence[Sample]) -> None:
    """Say how many attempts the server took for invalid, and why the first.

    Raises:
        ValueError: if it took all of them for that.
    """
    if not (invalid := [one.error for one in samples if one.error]):
        return
    said = f"{len(invalid)} of {len(samples)} attempts were invalid, such as: {invalid[0]}"
    if len(invalid) == len(samples):
        raise ValueError(said)
    sys.stderr.write(f"ballast-eval: {said}\n")


def _measures(chosen: Suite, args: argparse.Namespace) -> dict[str, Measure]:
    """Return the measures of a suite, with the tokenizer of what is served where one counts and none is named."""
    kind, _, name = args.target.partition(":")
    served = {"hub": name, "checkpoint": args.model}.get(kind, DEFAULT_MODEL)
    return {
        name: replace(one, tokenizer=one.tokenizer or args.tokenizer or served) if one.kind in DEPTHS else one
        for name, one in chosen.measures.items()
    }


def _facts(server: Server, measures: dict[str, Measure], args: argparse.Namespace) -> dict[str, Any]:
    """Return what a run is of: whatever differs makes it another run."""
    drawing = ("scenes", "conversations", "relapses", "search")
    own = [SCENES] if any(one.kind in drawing for one in measures.values()) else []
    files = [path for one in measures.values() for path in (one.data, one.filler) if path]
    counting = {one.tokenizer for one in measures.values() if one.tokenizer is not None}
    return {
        "suite": args.suite,
        "target": args.target,
        "model": server.model,
        "served_model": told(server) | {"fingerprint": fingerprint(args.target)},
        "version": version("ballast"),
        "settings": {} if is_address(args.target) else dict(filter(_is_setting, sorted(os.environ.items()))),
        "measures": TypeAdapter(dict[str, Measure]).dump_python(measures, mode="json"),
        "data_sha256": {str(path): checksum(path) for path in dict.fromkeys([*files, *own])},
        "tokenizer_sha256": {name: vocabulary(load_tokenizer(name)) for name in sorted(counting)},
    }


def _unwatched(chosen: Suite, server: Server) -> Suite:
    """Return the measures of a server that knows no policies, saying which are left out: nothing can be scored.

    Nor can a response be begun for it where it does not go on with one.

    Raises:
        OpenAIError: if it refuses the key or cannot be reached.
        ValueError: if none is left.
    """
    guided = (*SCORED, "search")
    found = {name: replace(one, policies=("none",)) for name, one in chosen.measures.items() if one.kind not in guided}
    if not found:
        raise ValueError(f"a plain model has no signal: all measures of the suite are of {list(guided)}")
    if left_out := ", ".join(name for name in chosen.measures if name not in found):
        sys.stderr.write(f"ballast-eval: the server serves a plain model, without a signal, left out: {left_out}\n")
    begun = [name for name, one in found.items() if one.kind in BEGUN]
    if begun and not continues(server):
        sys.stderr.write(
            "ballast-eval: the server does not go on with a response that is begun for it (continue_final_message), "
            f"left out: {', '.join(begun)}\n"
        )
        found = {name: one for name, one in found.items() if name not in begun}
    if not found:
        raise ValueError(f"all measures of the suite begin the response: they are of {list(BEGUN)}")
    return Suite(found)


def _is_setting(variable: tuple[str, str]) -> bool:
    name = variable[0]
    return name.startswith("BALLAST_") and "KEY" not in name


def report(found: Sequence[Run], out: Path, judge: Judge, judge_name: str, f1: Estimate | None = None) -> str:
    """Write `report.md`, `report.html` and `report.json` of one run or several into a folder; return the Markdown.

    Args:
        found: the runs.
        out: the folder.
        judge: tells whether a text harms.
        judge_name: what it is, in words.
        f1: of the judge against hand labels, None if unknown.
    """
    shown = page.of(found, judge, judge_name, f1)
    text = page.as_markdown(shown)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text, encoding="utf-8")
    (out / "report.html").write_text(page.as_html(shown), encoding="utf-8")
    numbers = json.dumps(shown.numbers, default=asdict, indent=2)
    (out / "report.json").write_text(numbers + "\n", encoding="utf-8")
    return text


def compare(first: Run, second: Run, judge: Judge, judge_name: str, f1: Estimate | None = None) -> str:
    """Return a table of how two runs differ over the prompts and rows that were judged in both.

    Args:
        first: a run.
        second: the other one.
        judge: tells whether a text harms.
        judge_name: what it is, in words.
        f1: of the judge against hand labels, None if unknown.

    Raises:
        ValueError: if they have none in common.
    """
    ours, theirs = runs.names([first, second])
    lines = [
        f"| measure | attack | policy of {theirs} | of {ours} | n | {ours} | {theirs} "
        f"| {ours} alone | {theirs} alone | same text | McNemar p |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = [*differences(first.samples, second.samples, judge), *score_differences(first.scores, second.scores)]
    if not found:
        raise ValueError("the two runs have no measure, attack and policy in common")
    warning = caveat(judge, f1)
    told = [*page.of_judge(judge_name, None if warning else f1), *([warning] if warning else [])]
    is_judged = any(first.samples.values()) and any(second.samples.values())
    notes = [*(told if is_judged else []), *page.doubts({ours: first, theirs: second})]
    for one in found:
        *cells, p = one
        lines.append(f"| {' | '.join('-' if cell is None else str(cell) for cell in cells)} | {p:.3g} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), *([""] if notes else [])])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["depth"]:
        return depth.main(words[1:])
    try:
        if words[:1] == ["tune"]:
            return tuning.main(words[1:], main)
        args = _arguments(words)
        judge, judge_name = _judge(args)
        if args.command == "run":
            chosen = suite.load(args.suite, args.data)
            suite.require_files(chosen)
            args.out.mkdir(parents=True, exist_ok=True)
            with serving(args.target, args.model, args.out / "server.log") as address, naming(address):
                run(chosen, address, args)
        f1 = quality(judge, args.labels) if args.labels else None
        if args.command == "compare":
            first, second = map(runs.read, args.runs)
            text = compare(first, second, judge, judge_name, f1)
        else:
            text = report(list(map(runs.read, args.runs)), args.out or args.runs[0], judge, judge_name, f1)
    except (ModelError, OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"ballast-eval: {error}\n")
        return 1
    sys.stdout.write(text)
    return 0


def _judge(args: argparse.Namespace) -> tuple[Judge, str]:
    """Return the judge of a command line, and what it is in words."""
    if args.judge is None:
        return by_phrases, PHRASES
    if not args.judge.startswith(("http://", "https://")):
        folder = Path(args.judge)
        found = [args.target] if args.command == "run" else [str(runs.read(one).facts["target"]) for one in args.runs]
        require_other(folder, found)
        return by_classifier(folder, args.judge_model or DEFAULT_MODEL), about_classifier(folder)
    if args.judge_model is None:
        raise ValueError("a judge at an address needs --judge-model, the name of a model there")
    folder = args.runs[0] if args.command == "compare" else args.out or args.runs[0]
    if args.command != "compare":
        folder.mkdir(parents=True, exist_ok=True)
    name = f"the language model {args.judge_model}, asked by the rubric of `evaluation/llm_judge.py`"
    return by_llm(args.judge, args.judge_model, folder / VERDICTS), name


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says; `runs` are the folders of the runs that it is about.

    Raises:
        ValueError: if several runs have no folder for their report.
    """
    args = _parser().parse_args(words)
    if args.command == "run":
        args.runs = [args.out]
    if args.command == "report" and args.out is None and len(args.runs) > 1:
        raise ValueError("a report of several runs needs --out, the folder that it is written to")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ballast-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    attacks = commands.add_parser("run", help="attack a target with every measure of a suite, and report")
    attacks.add_argument("suite", help=f"a YAML file, or one of {suite.shipped()}")
    attacks.add_argument("--target", required=True, help=KINDS)
    attacks.add_argument("--model", default=DEFAULT_MODEL, help="the model under a checkpoint (%(default)s)")
    attacks.add_argument("--served-model", metavar="NAME", help="of those that a server lists (the first)")
    attacks.add_argument(
        "--tokenizer",
        metavar="NAME",
        help=f"counts the tokens that are given (that of hub:NAME or of --model; for a server {DEFAULT_MODEL})",
    )
    add_parallel(attacks)
    attacks.add_argument("--api-key", default="none", help="key that may loosen, where the server asks for one")
    attacks.add_argument("--data", type=Path, default=Path("data/eval"), help="folder of the files (%(default)s)")
    attacks.add_argument("--out", type=Path, required=True, help="folder of the run; given again, it goes on")
    reports = commands.add_parser("report", help="report a run again, perhaps by another judge, or several in one")
    reports.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    reports.add_argument("--out", type=Path, help="folder of the report; beside the run unless there are several")
    compares = commands.add_parser("compare", help="how two runs differ, prompt by prompt")
    compares.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    for command in (attacks, reports, compares):
        command.add_argument(
            "--labels",
            type=Path,
            metavar="SHEET",
            help="labels by hand, their journals beside them: how good the judge is",
        )
        command.add_argument(
            "--judge",
            metavar="FOLDER|URL",
            help="checkpoint of a classifier, or an OpenAI-compatible endpoint such as https://host/v1 with the key in "
            "OPENAI_API_KEY; refusal phrases without one",
        )
        command.add_argument(
            "--judge-model", help=f"the model under the classifier ({DEFAULT_MODEL}), or the one at the endpoint"
        )
    commands.add_parser("depth", help="how deep a model's alignment goes", add_help=False)
    commands.add_parser("tune", help="fine-tune a checkpoint as an attacker would, and attack it", add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
