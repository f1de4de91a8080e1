"""Recipes are read strictly, and a fault is one line that names the key."""

from dataclasses import replace
from pathlib import Path

import pytest

from training import recipe_file
from training.__main__ import main
from training.config import HeadRecipe
from training.errors import RecipeError
from training.harden_config import HardenRecipe
from training.recipe_file import SHIPPED
from training.tune_config import AnchorRecipe, DpoRecipe, MergeRecipe, TuneRecipe


@pytest.fixture
def config(recipe: HeadRecipe, tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    recipe_file.dump(recipe, path)
    return str(path)


def test_a_dumped_recipe_reads_back_equal(config: str, recipe: HeadRecipe):
    assert recipe_file.load(HeadRecipe, config) == recipe


def test_every_shipped_recipe_opens_with_its_command_and_is_valid_there():
    kinds = {
        "head": HeadRecipe,
        "anchors": AnchorRecipe,
        "sft": TuneRecipe,
        "deepen": TuneRecipe,
        "signal": TuneRecipe,
        "constrain": TuneRecipe,
        "dpo": DpoRecipe,
        "merge": MergeRecipe,
        "harden": HardenRecipe,
        "calibrate": HeadRecipe,
        "query": HeadRecipe,
    }
    for path in SHIPPED.glob("*.yaml"):
        opening = path.read_text().splitlines()[0]
        _, program, command, option, name, _ = opening.split()
        assert (program, option, name) == ("ballast-train", "--config", f"training/recipes/{path.name}"), opening
        recipe_file.load(kinds[command], path.stem)


def test_a_recipe_begins_with_another_and_changes_what_it_names(tmp_path: Path):
    below = recipe_file.load(HeadRecipe, "head_all_rows")
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: head_all_rows\nseed: 4\nsources: {instructions: {calibration: 7}}\n")
    found = recipe_file.load(HeadRecipe, str(path), ["head.hidden=5"])
    instructions = replace(below.sources["instructions"], calibration=7)
    assert found == replace(
        below, seed=4, head=replace(below.head, hidden=5), sources=below.sources | {"instructions": instructions}
    )


def test_an_included_recipe_that_is_not_there_is_named(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: head_all_row\n")
    with pytest.raises(RecipeError, match="no recipe 'head_all_row'; shipped recipes are"):
        recipe_file.load(HeadRecipe, str(path))


def test_a_key_deep_in_a_part_is_explained():
    with pytest.raises(RecipeError, match=r"did you mean 'parts\.recovery\.recovery\.deepest'\?"):
        recipe_file.load(TuneRecipe, "deepened", ["parts.recovery.recovery.deepst=3"])
    with pytest.raises(RecipeError, match=r"unknown recipe key 'parts\.recover'; did you mean 'parts\.recovery'\?"):
        recipe_file.load(TuneRecipe, "deepened", ["parts.recover.share=0.1"])


def test_keys_that_do_not_go_together_are_told_in_a_line():
    with pytest.raises(RecipeError, match=r"^recipe: copy_steps copies an adapter alone: set lora, without signal$"):
        recipe_file.load(TuneRecipe, "signal", ["copy_steps=5"])


def test_overrides_reach_into_groups_and_lists(config: str):
    recipe = recipe_file.load(
        HeadRecipe,
        config,
        ["head.layers=[20, -1]", "response_optimiser.learning_rate=3e-4", "sources.triplets.limit=7", "seed=4"],
    )
    assert recipe.head.layers == (20, -1)
    assert recipe.response_optimiser.learning_rate == 3e-4
    assert recipe.sources["triplets"].limit == 7
    assert recipe.seed == 4


def test_a_whole_source_can_be_added(config: str):
    recipe = recipe_file.load(HeadRecipe, config, ["sources.mine={path: mine.jsonl, kind: prompts}"])
    assert recipe.sources["mine"].kind == "prompts"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown recipe key 'sed'; did you mean 'seed'?"),
        (
            "request_optimiser.epoch=1",
            "unknown recipe key 'request_optimiser.epoch'; did you mean 'request_optimiser.epochs'?",
        ),
        ("request_optimizer.epochs=1", "unknown recipe key 'request_optimizer'; did you mean 'request_optimiser'?"),
        ("sources.triplet.limit=1", "unknown recipe key 'sources.triplet'; did you mean 'sources.triplets'?"),
        ("sources.triplets.limt=1", "did you mean 'sources.triplets.limit'?"),
        ("sources.new={kind: prompts}", "recipe key sources.new.path is missing"),
        ("seed", "expected key=value, got 'seed'"),
        ("seed.a=1", "seed is a value"),
        ("loss.tau=0", "recipe key loss.tau: Input should be greater than 0, got 0"),
        ("loss.tau=.nan", "recipe key loss.tau"),
        ("sources.prompts.request_label=1", "request_label belongs to kind 'responses'"),
    ],
)
def test_a_wrong_override_is_explained(config: str, override: str, message: str):
    with pytest.raises(RecipeError) as caught:
        recipe_file.load(HeadRecipe, config, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "a: [", "\t", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"broken\.yaml"):
        recipe_file.load(HeadRecipe, str(path))


def test_a_mistake_on_the_command_line_is_one_line_and_code_2(config: str, capsys: pytest.CaptureFixture[str]):
    assert main(["head", "--config", config, "sed=1"]) == 2
    assert capsys.readouterr().err == "ballast-train: unknown recipe key 'sed'; did you mean 'seed'?\n"


def test_an_unknown_command_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["haed"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
