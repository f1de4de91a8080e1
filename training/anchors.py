"""The command `ballast-train anchors`: the model answers benign prompts itself, so that training can hold on to it.

Source: Qi et al. 2024 (arXiv 2406.05946), section 3: the utility anchors D_B are answers of the initial model.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from model.chat import Message
from model.pretrained import device_of, load
from training.answers import answer
from training.dialogues import Prompt, read_prompts
from training.errors import DataError
from training.report import checksums
from training.rows import Row
from training.shards import write_atomically
from training.tune_config import AnchorRecipe


def write_anchors(recipe: AnchorRecipe, command: str) -> Path:
    """Answer the prompts and write one JSON line each; return the file. Empty answers are left out.

    Beside it the same name with `.json` added says what it came from. Interrupted, the same recipe goes on where it
    was.

    Args:
        recipe: all choices.
        command: the command line, kept beside the answers.

    Raises:
        TrainingError: if the prompts cannot be read, or nothing was answered.
        ModelError: if the model cannot be loaded.
    """
    prompts = read_prompts(recipe)
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype), device=device_of(recipe.device))
    rows = [
        Row("anchors", prompt.source, prompt.licence, (Message("user", prompt.text),), None, None, None)
        for prompt in prompts
    ]
    answers = answer(
        pretrained,
        rows,
        recipe.answers,
        max_request_tokens=recipe.request_tokens,
        cache=Path(recipe.cache),
        seed=recipe.seed,
        with_end=True,
    )
    lines = _lines(prompts, answers, str(pretrained.tokenizer.eos_token))
    if not lines:
        raise DataError(f"the model answered none of {len(prompts)} prompts")
    output = Path(recipe.output)
    write_atomically(output, partial(_dump, lines))
    origin = {
        "command": command,
        "recipe": asdict(recipe),
        "data_sha256": checksums(recipe.sources.values(), recipe.data),
        "answers": len(lines),
    }
    write_atomically(output.with_name(f"{output.name}.json"), partial(_dump, [json.dumps(origin, indent=2) + "\n"]))
    return output


def _lines(prompts: Sequence[Prompt], answers: Sequence[str], end: str) -> list[str]:
    """Return one JSON line per answer that says something; `complete` is false where it was cut."""
    lines = []
    for prompt, made in zip(prompts, answers, strict=True):
        if text := made.removesuffix(end).strip():
            record = {
                "prompt": prompt.text,
                "response": text,
                "complete": made.endswith(end),
                "source": f"{prompt.source} ({prompt.licence})",
            }
            lines.append(json.dumps(record) + "\n")
    return lines


def _dump(lines: Sequence[str], path: Path) -> None:
    path.write_text("".join(lines), encoding="utf-8")
