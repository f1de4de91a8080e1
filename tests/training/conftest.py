"""Sentences of our own, mild ones, in the documented files; and the tiny model on disk."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from model.pretrained import Pretrained
from model.testing import byte_tokenizer, tiny_lm
from training.config import Cut, HeadRecipe, Optimiser, Query


@pytest.fixture(autouse=True)
def plots_where_they_are_looked_at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw only in tests that are marked for it: it takes as long as training the tiny model."""
    if request.node.get_closest_marker("draws") is None:
        for name in ("training.run.draw", "training.fit.draw_steps"):
            monkeypatch.setattr(name, lambda *arguments: None)


TOPICS = [
    "bread", "tea", "kites", "boats", "snow", "trains", "maps", "bees", "clocks", "paint", "moss", "drums",
    "lamps", "rivers", "socks", "pears", "stars", "wheels", "glue", "ferns", "chalk", "bells", "soap", "yarn",
]  # fmt: skip
FILLER = "The tide comes in twice a day, and whoever walks along the shore knows when. "


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with every documented file, each row about another topic."""
    folder = tmp_path / "data"
    folder.mkdir()
    free, bound = "Own sentences (MIT)", "Own sentences (CC-BY-NC-4.0)"
    lines: dict[str, list[dict[str, object]]] = {}
    lines["instructions.jsonl"] = [
        {"prompt": f"Tell me about {t}.", "response": f"Here is something about {t}.", "source": free} for t in TOPICS
    ]
    lines["benign_prompts.jsonl"] = [{"prompt": f"What are {t} for?", "source": bound} for t in TOPICS]
    lines["prompts.jsonl"] = [
        {"prompt": f"{'STEAL' if i % 2 else 'Buy'} some {t}", "harmful": i % 2, "source": free}
        for i, t in enumerate(TOPICS)
    ]
    lines["responses.jsonl"] = [
        {"prompt": f"Hm, {t}?", "response": f"{'GRAB' if i % 2 else 'See'} the {t}", "harmful": i % 2, "source": free}
        for i, t in enumerate(TOPICS)
    ]
    lines["triplets.jsonl"] = [
        {
            "prompt": f"STEAL my {t}",
            "harmful_response": f"Sure, GRAB the {t}",
            "refusal": "I would rather not",
            "source": free,
        }
        for t in TOPICS
    ]
    lines["refusals.jsonl"] = [
        {"prompt": f"BREAK the {t}", "response": f"No, the {t} stay whole", "source": bound} for t in TOPICS
    ]
    for name, records in lines.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


SOURCES = {
    "own_answers": {"path": "benign_prompts.jsonl", "kind": "own_answers", "limit": 8, "sets_block": ["response"]},
    "instructions": {"path": "instructions.jsonl", "kind": "instructions", "sets_block": ["request", "response"]},
    "alpaca": {"path": "benign_prompts.jsonl", "kind": "benign_prompts", "calibration": 8, "sets_block": ["request"]},
    "prompts": {"path": "prompts.jsonl", "kind": "prompts"},
    "responses": {"path": "responses.jsonl", "kind": "responses", "request_label": 0},
    "triplets": {"path": "triplets.jsonl", "kind": "triplets"},
    "refusals": {"path": "refusals.jsonl", "kind": "refusals"},
}
"""Every kind of source, over the files of `data`."""


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> HeadRecipe:
    """A recipe over all files, small enough for the tiny model."""
    return TypeAdapter(HeadRecipe).validate_python(
        {
            "sources": SOURCES,
            "model": str(tmp_path / "model"),
            "dtype": "float32",
            "device": "cpu",
            "data": str(data),
            "output": str(tmp_path / "checkpoint"),
            "run": str(tmp_path / "run"),
            "cache": str(tmp_path / "cache"),
            "validation": 0.25,
            "answers": {"max_tokens": 8, "batch_size": 4},
            "cut": {"request_tokens": 128, "response_tokens": 24},
            "head": {"hidden": 8},
            "request_optimiser": {"epochs": 3, "batch_size": 16},
            "response_optimiser": {"epochs": 3, "batch_size": 16},
        }
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Pretrained:
    """The tiny model, and written to where `recipe` looks for it."""
    model, tokenizer = tiny_lm(), byte_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return Pretrained("tiny", model.to(torch.float32), tokenizer)


@pytest.fixture
def saved_model(tiny: Pretrained, tmp_path: Path) -> Path:
    """Folder of the tiny model."""
    return tmp_path / "model"


@pytest.fixture
def hiding(recipe: HeadRecipe, data: Path, tmp_path: Path) -> HeadRecipe:
    """A recipe for the tiny model, whose data hold harmless text to hide requests in."""
    for path in (data / "instructions.jsonl", data / "refusals.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        longer = [row | {"response": f"{row['response']} {FILLER * 2}"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in longer))
    short = replace(recipe, cut=Cut(request_tokens=384, response_tokens=24))
    return replace(
        short,
        query=Query(limit=20, calibration=8),
        query_optimiser=Optimiser(epochs=60, batch_size=8, learning_rate=0.01),
    )
