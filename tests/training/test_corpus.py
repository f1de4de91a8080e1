"""Which rows a run uses: sampled by hash, no prompt in two parts, licences kept apart."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from training.augment import SYSTEM_MESSAGES, augment
from training.config import Augment, HeadRecipe
from training.corpus import assemble, sample
from training.errors import DataError
from training.rows import Row


def echo(rows: Sequence[Row]) -> list[str]:
    return [f"An answer to: {row.prompt}" for row in rows]


def limited(recipe: HeadRecipe, group: str, **changes: Any) -> HeadRecipe:
    return replace(recipe, sources={**recipe.sources, group: replace(recipe.sources[group], **changes)})


def test_no_prompt_stands_in_two_parts(recipe: HeadRecipe):
    rows = assemble(recipe, echo)
    parts: dict[str, set[str]] = {}
    for row in rows:
        parts.setdefault(row.key, set()).add(row.part)
    assert all(len(found) == 1 for found in parts.values())
    assert {row.part for row in rows} == {"train", "validation", "calibration"}


def test_letter_case_and_punctuation_do_not_make_another_prompt(recipe: HeadRecipe):
    row = assemble(recipe, echo)[0]
    shouted = replace(row, messages=(replace(row.messages[0], content=row.prompt.upper() + "!!"),))
    assert shouted.key == row.key


def test_prompts_of_a_response_alone_are_told_apart(recipe: HeadRecipe):
    row = assemble(recipe, echo)[0]
    bare = replace(row, messages=(replace(row.messages[0], content=""),), response="one")
    assert bare.key != replace(bare, response="two").key


def test_reserved_prompts_are_kept_from_training_in_every_source(recipe: HeadRecipe):
    rows = assemble(limited(recipe, "own_answers", calibration=8), echo)
    assert {row.part for row in rows if row.group == "own_answers"} == {"calibration"}
    assert sum(row.part == "calibration" for row in rows if row.group == "alpaca") == 8


def test_own_answers_are_filled_in_and_their_prompts_not_taken_again(recipe: HeadRecipe):
    rows = assemble(recipe, echo)
    own = [row for row in rows if row.group == "own_answers"]
    assert [row.response for row in own] == echo(own)
    assert not {row.key for row in own} & {row.key for row in rows if row.group == "alpaca"}


def test_a_prompt_that_the_model_answers_with_nothing_is_left_out(recipe: HeadRecipe):
    rows = assemble(recipe, lambda found: [" "] * len(found))
    assert "own_answers" not in {row.group for row in rows}


def test_a_higher_limit_keeps_the_rows_of_a_lower_one(recipe: HeadRecipe):
    rows = [row for row in assemble(recipe, echo) if row.group == "responses"]
    assert sample(rows, 5, seed=0) == sample(rows, 9, seed=0)[:5]
    assert sample(rows, 9, seed=0) != sample(rows, 9, seed=1)


def test_the_permissive_filter_leaves_no_other_licence(recipe: HeadRecipe):
    without = {name: source for name, source in recipe.sources.items() if name not in ("own_answers", "alpaca")}
    rows = assemble(replace(recipe, sources=without, is_permissive_only=True), echo)
    assert {row.licence for row in rows} == {"MIT"}
    assert "refusals" not in {row.group for row in rows}


def test_a_recipe_that_leaves_no_row_says_so(recipe: HeadRecipe):
    with pytest.raises(DataError, match="no row is left in the train part"):
        assemble(replace(recipe, sources={"refusals": replace(recipe.sources["refusals"], limit=0)}), echo)


def test_conversations_leave_labels_and_prompts_alone(recipe: HeadRecipe):
    rows = assemble(recipe, echo)
    changed = augment(rows, Augment(history=0.5, system=0.5), seed=0)
    assert [(r.key, r.request_label, r.response_label, r.part) for r in changed] == [
        (r.key, r.request_label, r.response_label, r.part) for r in rows
    ]
    assert {len(row.messages) for row in changed} == {1, 2, 3, 4}
    assert augment(rows, Augment(history=0.5, system=0.5), seed=0) == changed
    assert augment(rows, Augment(history=0, system=0), seed=0) == rows


def test_history_comes_from_benign_rows_of_the_same_part(recipe: HeadRecipe):
    rows = assemble(recipe, echo)
    part_of = {row.prompt: row.part for row in rows if (row.request_label, row.response_label) == (0, 0)}
    changed = augment(rows, Augment(history=1, system=0), seed=0)
    assert all(part_of[row.messages[0].content] == row.part for row in changed if len(row.messages) == 3)


def test_there_are_eight_different_system_messages():
    assert len(set(SYSTEM_MESSAGES)) == 8


def test_a_source_without_a_row_is_an_error(recipe: HeadRecipe):
    with pytest.raises(DataError, match=r"sources\.prompts: no row of prompts\.jsonl has a source that begins with"):
        assemble(limited(recipe, "prompts", match="Misspelt"), echo)
