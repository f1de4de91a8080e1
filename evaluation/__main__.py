"""`ballast-eval`: how safe is a model or a running server? Suites of attacks, reports, and how two runs differ."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from openai import OpenAIError

from evaluation import depth, suite
from evaluation.attack import attack, plan
from evaluation.client import connect
from evaluation.judges import Judge, by_classifier, by_phrases
from evaluation.outcomes import differences, outcomes
from evaluation.page import as_html, as_markdown
from evaluation.samples import Journal, Sample
from evaluation.suite import Suite
from evaluation.target import KINDS, serving
from model.errors import ModelError
from model.pretrained import DEFAULT_MODEL, sha256_of

RUN = "run.json"


def run(chosen: Suite, address: str, args: argparse.Namespace) -> None:
    """Make every attempt that the run in `--out` has not made yet."""
    server = connect(argparse.Namespace(server=address, api_key=args.api_key), timeout=600)
    facts = {
        "suite": args.suite,
        "target": args.target,
        "model": server.model,
        "data_sha256": {
            str(path): sha256_of(path)
            for measure in chosen.measures.values()
            for path in (measure.data, measure.filler)
            if path is not None
        },
        "measures": list(chosen.measures),
    }
    (args.out / RUN).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for name, measure in chosen.measures.items():
        sys.stderr.write(f"{name}\n")
        watched = not args.target.startswith("hub:")
        policies = measure.policies if watched else ("none",)
        attempts = plan(replace(measure, policies=policies))
        attack(server, attempts, args.out / f"{name}.jsonl", args.out.name, is_watched=watched)


def read_run(folder: Path) -> dict[str, list[Sample]]:
    """Return the samples of a run by measure.

    Raises:
        ValueError: if the folder holds none.
    """
    path = folder / RUN
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: {path} does not exist")
    names: list[str] = json.loads(path.read_text(encoding="utf-8"))["measures"]
    samples = {name: list(Journal(folder / f"{name}.jsonl")) for name in names}
    if not any(samples.values()):
        raise ValueError(f"{folder} holds no sample yet")
    return samples


def report(folder: Path, judge: Judge) -> str:
    """Write `report.md`, `report.html` and `report.json` of a run beside it; return the Markdown."""
    found = outcomes(read_run(folder), judge)
    facts = json.loads((folder / RUN).read_text(encoding="utf-8"))
    title = f"{Path(facts['suite']).stem} against {facts['target']}"
    text = as_markdown(title, found)
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(as_html(title, found), encoding="utf-8")
    whole = json.dumps(facts | {"outcomes": [asdict(one) for one in found]}, indent=2)
    (folder / "report.json").write_text(whole + "\n", encoding="utf-8")
    return text


def compare(first: Path, second: Path, judge: Judge) -> str:
    """Return a table of how two runs differ over the prompts that both have."""
    lines = [
        f"| measure | attack | policy | n | {first.name} | {second.name} | {first.name} alone | {second.name} alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in differences(read_run(first), read_run(second), judge):
        lines.append("| " + " | ".join(map(str, one)) + " |")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["depth"]:
        return depth.main(words[1:])
    args = _parser().parse_args(words)
    try:
        judge = by_phrases if args.judge is None else by_classifier(args.judge, args.judge_model)
        if args.command == "run":
            chosen = suite.load(args.suite, args.data)
            args.out.mkdir(parents=True, exist_ok=True)
            with serving(args.target, args.model, args.out / "server.log") as address:
                run(chosen, address, args)
        text = compare(args.first, args.second, judge) if args.command == "compare" else report(args.out, judge)
    except (ModelError, OpenAIError, OSError, ValueError) as error:
        sys.stderr.write(f"ballast-eval: {error}\n")
        return 1
    sys.stdout.write(text)
    return 0


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
        command.add_argument("--judge", type=Path, help="checkpoint of a classifier; refusal phrases without one")
        command.add_argument("--judge-model", default=DEFAULT_MODEL, help="the model under it (%(default)s)")
    commands.add_parser("depth", help="how deep a model's alignment goes", add_help=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
