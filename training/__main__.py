"""The script `ballast-train`: a table of commands, each with a recipe and `key=value` overrides."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from model.errors import ModelError
from training import recipe_file
from training.config import HeadRecipe
from training.errors import RecipeError, TrainingError
from training.harden_config import HardenRecipe
from training.memory import keep_freed
from training.tune_config import AnchorRecipe, DpoRecipe, MergeRecipe, TuneRecipe

USER_ERROR = 2
INTERRUPTED = 130


class Command(NamedTuple):
    """One entry of the table."""

    run: Callable[[argparse.Namespace, str], None]
    recipe: str
    """The shipped recipe that it reads where none is named."""
    summary: str
    example: str


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """End the program with the message."""
        self.exit(USER_ERROR, f"{self.prog}: {message}; see --help\n")


def _say(text: str) -> None:
    """Tell the user, once for all processes of a parallel run."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{text}\n")


def run_head(arguments: argparse.Namespace, command: str) -> None:
    """Train and calibrate a token head."""
    recipe = recipe_file.load(HeadRecipe, arguments.config, arguments.overrides)
    from training.run import train_head  # here, because torch and transformers take seconds to import

    folder = train_head(recipe, command)
    _say(f"wrote {folder}; serve it with BALLAST_CHECKPOINT={folder}")


def run_calibrate(arguments: argparse.Namespace, command: str) -> None:
    """Set thresholds anew."""
    recipe = recipe_file.load(HeadRecipe, arguments.config, arguments.overrides)
    from training.run import calibrate_checkpoint

    folder = calibrate_checkpoint(recipe, command)
    _say(f"wrote {folder}; serve it with BALLAST_CHECKPOINT={folder}")


def run_query(arguments: argparse.Namespace, command: str) -> None:
    """Add a head for the query."""
    recipe = recipe_file.load(HeadRecipe, arguments.config, arguments.overrides)
    from training.query import add_query_head

    folder = add_query_head(recipe, command)
    _say(f"wrote {folder}; serve it with BALLAST_CHECKPOINT={folder}")


def run_tune(arguments: argparse.Namespace, command: str) -> None:
    """Fine-tune a language model."""
    _tune(recipe_file.load(TuneRecipe, arguments.config, arguments.overrides), command)


def run_constrain(arguments: argparse.Namespace, command: str) -> None:
    """Fine-tune a language model under the constrained objective."""
    recipe = recipe_file.load(TuneRecipe, arguments.config, arguments.overrides)
    if recipe.constraint is None:
        raise RecipeError("the recipe has no constraint: set constraint={}, or use ballast-train sft")
    _tune(recipe, command)


def _tune(recipe: TuneRecipe, command: str) -> None:
    from training.tune import tune

    keep_freed()
    _say(f"wrote {tune(recipe, command)}")


def run_anchors(arguments: argparse.Namespace, command: str) -> None:
    """Let a model answer benign prompts."""
    recipe = recipe_file.load(AnchorRecipe, arguments.config, arguments.overrides)
    from training.anchors import write_anchors

    _say(f"wrote {write_anchors(recipe, command)}")


def run_dpo(arguments: argparse.Namespace, command: str) -> None:
    """Train on preferences."""
    recipe = recipe_file.load(DpoRecipe, arguments.config, arguments.overrides)
    from training.preference import dpo

    _say(f"wrote {dpo(recipe, command)}")


def run_harden(arguments: argparse.Namespace, command: str) -> None:
    """Take a model the whole way."""
    given = {"model": arguments.model, "data": arguments.data, "output": arguments.output}
    named = [f"{key}={value}" for key, value in given.items() if value is not None]
    recipe = recipe_file.load(HardenRecipe, arguments.config, [*named, *arguments.overrides])
    from training.harden import harden

    keep_freed()
    folder, found = harden(recipe, command)
    _say(f"{found}\nwrote {folder}; serve it with BALLAST_MODEL={recipe.model} BALLAST_CHECKPOINT={folder}")


def run_merge(arguments: argparse.Namespace, command: str) -> None:
    """Add an adapter to its model."""
    recipe = recipe_file.load(MergeRecipe, arguments.config, arguments.overrides)
    from training.merge import merge

    _say(f"wrote {merge(recipe, command)}")


COMMANDS = {
    "anchors": Command(
        run_anchors,
        "anchors",
        "let the model answer benign prompts itself, for training to hold on to",
        """examples:
  ballast-train anchors data=data/train
  ballast-train anchors --config my_recipe.yaml output=runs/mine.jsonl sources.alpaca.limit=200

Interrupted? The same command goes on where it was. Every key of a recipe is explained in training/tune_config.py.""",
    ),
    "head": Command(
        run_head,
        "head_all_rows",
        "train and calibrate the token head on a frozen model, and write a checkpoint",
        """examples:
  ballast-train head --config head_all_rows data=data/train
  ballast-train head --config my_recipe.yaml output=checkpoints/mine seed=1 response_optimiser.epochs=20
  ballast-train head data=/data sources.diasafety.limit=1000 head.layers=[20,-1]

Interrupted? The same command goes on where it was. Every key of a recipe is explained in training/config.py.""",
    ),
    "calibrate": Command(
        run_calibrate,
        "calibrate",
        "set the thresholds of a checkpoint anew, or those of a [CLS] signal without a token head",
        """examples:
  ballast-train calibrate checkpoint=checkpoints/mine output=checkpoints/stricter acting.request_false_positives=0.01
  ballast-train calibrate adapter=runs/signal/adapter output=checkpoints/cls-alone schedule=periodic-8

The recipe's sources are the rows that thresholds are set on. Every key is explained in training/config.py.""",
    ),
    "query": Command(
        run_query,
        "query_deepened_signal",
        "add a head that reads every token of the query, against requests hidden in long messages, and set `flag` anew",
        """examples:
  ballast-train query data=data/train output=checkpoints/mine
  ballast-train query --config my_recipe.yaml checkpoint=checkpoints/mine query.limit=1000

Interrupted? The same command goes on where it was. Every key of a recipe is explained in training/config.py.""",
    ),
    "sft": Command(
        run_tune,
        "aligned",
        "fine-tune a model on requests with their responses",
        """examples:
  ballast-train sft --config aligned data=data/train
  ballast-train sft --config my_recipe.yaml steps=100 lora.rank=8

Every key of a recipe is explained in training/tune_config.py.""",
    ),
    "deepen": Command(
        run_tune,
        "deepened",
        "teach refusals that hold after a harmful beginning",
        """examples:
  ballast-train deepen --config deepened data=data/train
  ballast-train deepen parts.recovery.recovery.deepest=200

Every key of a recipe is explained in training/tune_config.py.""",
    ),
    "signal": Command(
        run_tune,
        "signal",
        "train the [CLS] signal together with the model",
        """examples:
  ballast-train signal --config signal data=data/train
  ballast-train signal signal.request_weight=0.01 signal.is_read=false

Every key of a recipe is explained in training/tune_config.py.""",
    ),
    "constrain": Command(
        run_constrain,
        "constrained_sql",
        "fine-tune on any data, holding the first tokens of each response near the model's own",
        """examples:
  ballast-train constrain --config constrained_sql data=data/finetune
  ballast-train constrain constraint.early=1.0

Every key of a recipe is explained in training/tune_config.py.""",
    ),
    "dpo": Command(
        run_dpo,
        "dpo",
        "direct preference optimisation on refusals and harmful responses, a baseline",
        """examples:
  ballast-train dpo --config dpo data=data/train
  ballast-train dpo model=runs/aligned/model beta=0.05

Every key of a recipe is explained in training/tune_config.py.""",
    ),
    "harden": Command(
        run_harden,
        "harden",
        "take a model the whole way: anchors, deepened refusals with [CLS], the heads, thresholds, a quick check",
        """examples:
  ballast-train harden --model HuggingFaceTB/SmolLM2-360M-Instruct --data data/train
  ballast-train harden --model models/mine --data data/train --output checkpoints/mine signal.steps=300 seed=1

Interrupted? The same command goes on where it was. The recipe holds those of its steps: anchors, signal and head.""",
    ),
    "merge": Command(
        run_merge,
        "merge",
        "add an adapter to the weights of its model, and write the whole model",
        """examples:
  ballast-train merge adapter=runs/deepened/adapter output=runs/deepened/model

Every key of a recipe is explained in training/tune_config.py.""",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    try:
        COMMANDS[arguments.command].run(arguments, shlex.join(["ballast-train", *words]))
    except (TrainingError, ModelError) as error:
        sys.stderr.write(f"ballast-train: {error}\n")
        return USER_ERROR
    except ModuleNotFoundError as error:
        sys.stderr.write(f"ballast-train: {error.name} is not installed; pip install 'ballast[train]'\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("ballast-train: interrupted; the same command goes on from here\n")
        return INTERRUPTED
    return 0


def _parser() -> Parser:
    parser = Parser(prog="ballast-train", description="Train what a safety checkpoint holds.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=command.example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--config", default=command.recipe, help="recipe file or shipped recipe (%(default)s)")
        if name == "harden":
            sub.add_argument("--model", help="short name, folder or Hub id")
            sub.add_argument("--data", help="folder of the sources' files")
            sub.add_argument("--output", help="folder of the checkpoint")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set, dots lead into groups")
    return parser


if __name__ == "__main__":
    sys.exit(main())
