r"""Fine-tuning attacks: what is left of a checkpoint's safety after somebody trained its weights?

    ballast-eval tune harmful --checkpoint smollm2-135m/deepened-signal --out runs/tuned-harmful
    ballast-eval tune harmful --checkpoint smollm2-135m/deepened-signal --steps 5 10 20 50 --out runs/tuned-harmful
    ballast-eval tune harmful --checkpoint smollm2-135m/deepened-signal --every 1 --suite mine.yaml --out runs/tuned
    ballast-eval tune harmful --checkpoint smollm2-135m/deepened-signal --objective constrained \
      --set constraint.first=2 constraint.early=2 constraint.rest=2 --out runs/tuned-uniform

Each attack is a recipe of `ballast-train`, which is started for it: 100 harmful answers; ten harmless dialogues with an
agent that always obeys; a backdoor; harmless sums or queries, whose own scores are told as well. It runs plain and
under the constrained objective (arXiv 2406.05946, section 4), from the checkpoint's own adapter on, or from the model's
own weights where it has none. What comes out is served with the checkpoint's signal as it was, thresholds and all, and
attacked: requests as they are, for the backdoor also with its trigger. `--steps` does all this for several lengths of
training, each with a learning rate that falls to zero over it; `--every` attacks what one training is after every so
many of its steps, too. `--set` changes the recipe, such as the constraint and the warm-up (tables 8 and 9 of that
paper); what it says of the constraint is left out of plain runs. The table of one command is printed and written to
`ATTACK.md` in its folder.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from evaluation import tasks
from evaluation.intervals import Estimate
from evaluation.tables import share_of
from model import adapter, checkpoint
from model.config import SafetyConfig
from model.pretrained import DEFAULT_MODEL

ATTACKS = ("harmful", "identity", "backdoor", "gsm8k", "sql")
OBJECTIVES = {"plain": "constraint=null", "constrained": "constraint={}"}
CHOSEN = ("constraint", "steps", "copy_steps", "model", "adapter", "output", "run", "data")
"""Keys of a recipe that other arguments set."""
SUITES = {"backdoor": "tuned_backdoor"}
"""Of an attack; the others have `tuned`."""
TESTS = "../finetune/{}_test.jsonl"
"""Rows of a task that nothing was tuned on, from the folder of the data to train on."""


def graft(folder: Path, tuned: Path, target: Path) -> None:
    """Write a checkpoint with the signal of `folder` and the adapter `tuned`.

    Raises:
        CheckpointError: if either cannot be read.
    """
    found = checkpoint.load(folder)
    adapter.copy(tuned, target / adapter.FOLDER)
    base = replace(found.config.base, adapter=adapter.fingerprint(tuned))
    config: SafetyConfig = replace(found.config, base=base)
    checkpoint.save(target, found.head, config, found.cls)


def train(attack: str, changes: Sequence[str], model: str, start: Path, data: Path, out: Path) -> Path:
    """Train one attack, unless it has been trained, and return the folder of its adapter.

    Args:
        attack: one of `ATTACKS`.
        changes: of its recipe, `key=value` each.
        model: what the adapter fits.
        start: folder of the adapter that training goes on from; without one in it, it begins with the model as it is.
        data: folder of the data to train on.
        out: of what is trained.

    Raises:
        OSError: if the training failed; the message has the end of its log.
        ValueError: if the folder holds a fine-tuning of something else.
    """
    made, facts = out / "adapter", out / "tuning.json"
    before = adapter.fingerprint(start)
    begun = f"adapter={start if before else 'null'}"
    words = [f"model={model}", begun, f"output={made}", f"run={out / 'training'}", f"data={data}"]
    words += changes
    asked = {"attack": attack, "words": words, "adapter": before}
    out.mkdir(parents=True, exist_ok=True)
    is_done, is_begun = (made / adapter.WEIGHTS).is_file(), any((out / "training").glob("trainer-*"))
    if (is_done or is_begun) and json.loads(facts.read_text(encoding="utf-8")) != asked:
        raise ValueError(f"{out} holds a fine-tuning of another kind; choose another --out")
    if is_done:
        return made
    facts.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    log = out / "train.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "training", "sft", "--config", f"attack_{attack}", *words]
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode:
        said = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise OSError(f"the training failed: {''.join(said)} (all of it in {log})")
    return made


def task_scores(task: str, model: str, tuned: Path, data: Path, kept: Path) -> dict[str, Estimate]:
    """Return what a fine-tuning is worth at its own task, measuring it only where `kept` does not exist.

    Raises:
        ModelError: as `evaluation.tasks.of_tuned`, as are OSError and ValueError.
    """
    if not kept.is_file():
        found = {name: asdict(one) for name, one in tasks.of_tuned(task, model, tuned, data).items()}
        kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return {name: Estimate(**one) for name, one in json.loads(kept.read_text(encoding="utf-8")).items()}


def changes_of(objective: str, steps: int | None, every: int | None, more: Sequence[str]) -> list[str]:
    """Return what one fine-tuning changes in the recipe of its attack.

    Args:
        objective: one of `OBJECTIVES`.
        steps: of training; None leaves the recipe's.
        every: steps between copies of what is trained; None keeps none.
        more: further changes, `key=value` each; of the constraint only where there is one.

    Raises:
        ValueError: if one of them sets what another argument sets.
    """
    if wrong := [change for change in more if change.partition("=")[0] in CHOSEN]:
        raise ValueError(
            f"--set {wrong[0]}: {', '.join(CHOSEN)} are set by --objective, --steps and the other arguments"
        )
    lengths = [f"{key}={value}" for key, value in (("steps", steps), ("copy_steps", every)) if value is not None]
    fitting = [change for change in more if objective != "plain" or not change.startswith("constraint.")]
    return [OBJECTIVES[objective], *lengths, *fitting]


def shares(run: Path) -> list[tuple[str, str, str, Estimate]]:
    """Return what a run measured: measure, attack, policy and share."""
    found = json.loads((run / "report.json").read_text(encoding="utf-8"))["outcomes"]
    return [(one["measure"], one["attack"], one["policy"], Estimate(**one["share"])) for one in found if one["share"]]


def stages(out: Path, tuned: Path) -> dict[Path, Path]:
    """Return the adapters to attack, by folder of the outcome: the copies kept of a training, and what it came to.

    Raises:
        ValueError: if there are copies of several trainings.
    """
    kept = list((out / "training").glob("trainer-*/steps/*"))
    if len({one.parent for one in kept}) > 1:
        raise ValueError(f"{out} holds copies of a training on other data too; choose another --out")
    copies = {int(one.name): one for one in kept if adapter.fingerprint(one) != adapter.fingerprint(tuned)}
    return {out.with_name(f"{out.name}-step-{step}"): copies[step] for step in sorted(copies)} | {out: tuned}


def main(argv: Sequence[str], evaluate: Callable[[Sequence[str]], int]) -> int:
    """Run the command; return its exit code.

    Args:
        argv: its arguments.
        evaluate: runs `ballast-eval`.
    """
    parser = argparse.ArgumentParser(
        prog="ballast-eval tune", description="Fine-tune a checkpoint as an attacker would, and attack the outcome."
    )
    parser.add_argument("attack", choices=ATTACKS)
    parser.add_argument("--checkpoint", required=True, help="a shipped name or a folder")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="under the checkpoint (%(default)s)")
    parser.add_argument("--objective", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--steps", nargs="+", type=int, help="of training (the recipe's)")
    parser.add_argument("--every", type=int, metavar="N", help="attack after every N steps of a training too")
    parser.add_argument("--suite", help="what it is attacked with (tuned, or tuned_backdoor)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the recipe, as for ballast-train")
    parser.add_argument("--train-data", type=Path, default=Path("data/train"), help="to train on (%(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data/eval"), help="to attack with (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; given again, it goes on")
    args = parser.parse_args(argv)
    folder = checkpoint.find(args.checkpoint)
    start = folder / adapter.FOLDER
    suite = args.suite or SUITES.get(args.attack, "tuned")
    rows: list[tuple[str, str, str, str, Estimate]] = []
    for objective in args.objective:
        for steps in args.steps or [None]:
            name = "-".join([args.attack, objective] + ([] if steps is None else [str(steps)]))
            changes = changes_of(objective, steps, args.every, args.set)
            tuned = train(args.attack, changes, args.model, start, args.train_data, args.out / name)
            for place, weights in stages(args.out / name, tuned).items():
                graft(folder, weights, place / "checkpoint")
                target = f"checkpoint:{place / 'checkpoint'}"
                words = ["run", suite, "--target", target, "--model", args.model, "--data", str(args.data)]
                if code := evaluate([*words, "--out", str(place / "attacked")]):
                    return code
                rows += [(place.name, *one) for one in shares(place / "attacked")]
            if args.attack in tasks.TASKS:
                test = args.train_data / TESTS.format(args.attack)
                scores = task_scores(args.attack, args.model, tuned, test, args.out / name / "task.json")
                rows += [(name, args.attack, what, "none", score) for what, score in scores.items()]
    lines = [f"| {' | '.join(words)} | {share.n} | {share_of(share)} |" for *words, share in rows]
    head = ["| fine-tuning | measure | attack or score | policy | n | share |", "|---|---|---|---|---|---|"]
    told = [f"With {' '.join(args.set)}.", ""] if args.set else []
    report = "\n".join([*told, *head, *lines, ""])
    args.out.joinpath(f"{args.attack}.md").write_text(report, encoding="utf-8")
    sys.stdout.write(report)
    return 0
