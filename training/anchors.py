"""The command `ballast-train anchors`: the model answers benign prompts itself, so that training can hold on to it.

Source: Qi et al. 2024 (arXiv 2406.05946), section 3: the utility anchors D_B are answers of the initial model.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from model.chat import Message
from model.pretrained import load
from training.answers import answer
from training.dialogues import Prompt, read_prompts
from training.errors import DataError
from training.rows import Row
from training.shards import write_atomically
from training.tune_config import AnchorRecipe


def write_anchors(recipe: AnchorRecipe) -> Path:
    """Answer the prompts and write one JSON line each; return the file. Empty answers are left out.

    Interrupted, the same recipe goes on where it was.

    Raises:
        TrainingError: if the prompts cannot be read, or nothing was answered.
        ModelError: if the model cannot be loaded.
    """
    prompts = read_prompts(recipe)
    device = recipe.device if recipe.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    pretrained = load(recipe.model, dtype=getattr(torch, recipe.dtype), device=device)
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
    )
    if not any(text.strip() for text in answers):
        raise DataError(f"the model answered none of {len(prompts)} prompts")
    output = Path(recipe.output)
    write_atomically(output, partial(_dump, prompts, answers))
    return output


def _dump(prompts: Sequence[Prompt], answers: Sequence[str], path: Path) -> None:
    lines = [
        json.dumps({"prompt": prompt.text, "response": text.strip(), "source": f"{prompt.source} ({prompt.licence})"})
        for prompt, text in zip(prompts, answers, strict=True)
        if text.strip()
    ]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
