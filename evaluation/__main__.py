"""`ballast-eval`: how safe is a model or a running server? Suites of attacks, reports, and how two runs differ."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import OpenAIError
from pydantic import TypeAdapter

from evaluation import depth, suite, tuning
from evaluation.attack import attack, plan
from evaluation.client import connect
from evaluation.judges import Judge, by_classifier, by_phrases
from evaluation.llm_judge import by_llm
from evaluation.outcomes import differences, outcomes
from evaluation.page import as_html, as_markdown
from evaluation.samples import Journal, Sample
from evaluation.suite import Measure, Suite
from evaluation.target import KINDS, serving
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL, sha256_of

RUN = "run.json"
VERDICTS = "verdicts.jsonl"
PHRASES = "refusal phrases; text without one counts as harm, also where it neither refuses nor harms"


def run(chosen: Suite, address: str, args: argparse.Namespace) -> None:
    """Make every attempt that the run in `--out` has not made yet.

    Raises:
        ValueError: if it is a run of something else.
    """
    server = connect(address, args.api_key)
    is_watched = not args.target.startswith("hub:")
    measures = {name: one if is_watched else replace(one, policies=("none",)) for name, one in chosen.measures.items()}
    plans = {name: plan(measure) for name, measure in measures.items()}
    facts = {
        "suite": args.suite,
        "target": args.target,
        "model": server.model,
        "version": version("ballast"),
        "settings": {name: value for name, value in sorted(os.environ.items()) if _is_setting(name)},
        "measures": TypeAdapter(dict[str, Measure]).dump_python(measures, mode="json"),
        "attempts": {name: len(attempts) for name, attempts in plans.items()},
        "data_sha256": {
            str(path): sha256_of(path) for one in measures.values() for path in (one.data, one.filler) if path
        },
    }
    _settle(args.out / RUN, facts)
    for name, attempts in plans.items():
        attack(server, attempts, args.out / f"{name}.jsonl", args.out.name, is_watched=is_watched)


def _is_setting(name: str) -> bool:
    return name.startswith("BALLAST_") and "KEY" not in name


def _settle(path: Path, facts: dict[str, Any]) -> None:
    """Write what the run is of, or see that it is the same that was written.

    Raises:
        ValueError: naming what differs.
    """
    if not path.is_file():
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if other := [name for name, value in facts.items() if before.get(name) != json.loads(json.dumps(value))]:
        raise ValueError(f"{path.parent} holds a run with another {', '.join(other)}; choose another --out")


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Return what a run is of, and its samples by measure.

    Raises:
        ValueError: if the folder holds none.
    """
    path = folder / RUN
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: {path} does not exist")
    facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    samples = {name: list(Journal(folder / f"{name}.jsonl")) for name in facts["measures"]}
    if not any(samples.values()):
        raise ValueError(f"{folder} holds no sample yet")
    return facts, samples


def report(folder: Path, judge: Judge, judge_name: str) -> str:
    """Write `report.md`, `report.html` and `report.json` of a run beside it; return the Markdown."""
    facts, samples = read_run(folder)
    found = outcomes(samples, judge)
    title = f"{Path(facts['suite']).stem} against {facts['target']}"
    missing = {name: num - len(samples[name]) for name, num in facts["attempts"].items() if num > len(samples[name])}
    settings = ", ".join(f"{name}={value}" for name, value in facts["settings"].items())
    notes = [
        f"Judge: {judge_name}.",
        f"Model: {facts['model']}. Ballast {facts['version']}{f' with {settings}' if settings else ''}.",
        f"Command: `ballast-eval run {facts['suite']} --target {facts['target']} --out {folder.name}`",
        *(f"{num} attempts of {name} are still to be made." for name, num in missing.items()),
    ]
    text = as_markdown(title, notes, found)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(as_html(title, notes, found), encoding="utf-8")
    whole = json.dumps(facts | {"judge": judge_name, "outcomes": [asdict(one) for one in found]}, indent=2)
    (folder / "report.json").write_text(whole + "\n", encoding="utf-8")
    return text


def compare(first: Path, second: Path, judge: Judge) -> str:
    """Return a table of how two runs differ over the prompts that both have."""
    lines = [
        f"| measure | attack | policy of {second.name} | of {first.name} | n | {first.name} | {second.name} "
        f"| {first.name} alone | {second.name} alone | McNemar p |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for *cells, p in differences(read_run(first)[1], read_run(second)[1], judge):
        lines.append(f"| {' | '.join(map(str, cells))} | {p:.3g} |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["depth"]:
        return depth.main(words[1:])
    try:
        if words[:1] == ["tune"]:
            return tuning.main(words[1:], main)
        args = _parser().parse_args(words)
        judge, judge_name = _judge(args)
        if args.command == "run":
            chosen = suite.load(args.suite, args.data)
            args.out.mkdir(parents=True, exist_ok=True)
            with serving(args.target, args.model, args.out / "server.log") as address:
                run(chosen, address, args)
        comparing = args.command == "compare"
        text = compare(args.first, args.second, judge) if comparing else report(args.out, judge, judge_name)
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
        return by_classifier(Path(args.judge), args.judge_model or DEFAULT_MODEL), f"the classifier {args.judge}"
    if args.judge_model is None:
        raise ValueError("a judge at an address needs --judge-model, the name of a model there")
    folder = args.first if args.command == "compare" else args.out
    folder.mkdir(parents=True, exist_ok=True)
    name = f"the language model {args.judge_model}, asked by the rubric of `evaluation/llm_judge.py`"
    return by_llm(args.judge, args.judge_model, folder / VERDICTS), name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ballast-eval", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="attack a target with every measure of a suite, and report")
    runs.add_argument("suite", help=f"a YAML file, or one of {suite.shipped()}")
    runs.add_argument("--target", required=True, help=KINDS)
    runs.add_argument("--model", default=DEFAULT_MODEL, help="the model under a checkpoint (%(default)s)")
    runs.add_argument("--api-key", default="none", help="key that may loosen, where the server asks for one")
    runs.add_argument("--data", type=Path, default=Path("data/eval"), help="folder of the files (%(default)s)")
    runs.add_argument("--out", type=Path, required=True, help="folder of the run; given again, it goes on")
    reports = commands.add_parser("report", help="report a run again, perhaps by another judge")
    reports.add_argument("out", type=Path, metavar="RUN")
    compares = commands.add_parser("compare", help="how two runs differ, prompt by prompt")
    compares.add_argument("first", type=Path)
    compares.add_argument("second", type=Path)
    for command in (runs, reports, compares):
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
