"""A small fine-tuning recipe, what a run of it leaves behind, and callbacks that watch it."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from training.tune_config import TuneRecipe

RECOVERY = {"sources": {"triplets": {"path": "triplets.jsonl", "kind": "triplets"}}, "share": 0.2, "per_step": 2}
ANCHORS = {"sources": {"instructions": {"path": "instructions.jsonl"}}, "share": 0.8, "per_step": 6}


def places(saved_model: Path, data: Path, out: Path) -> dict[str, str]:
    """Return where a run of the tiny model reads and writes."""
    return {
        "model": str(saved_model),
        "dtype": "float32",
        "device": "cpu",
        "data": str(data),
        "output": str(out / "adapter"),
        "run": str(out / "run"),
    }


def recipe(saved_model: Path, data: Path, out: Path, **changes: Any) -> TuneRecipe:
    values: dict[str, Any] = {
        **places(saved_model, data, out),
        "validation": 0.0,
        "steps": 4,
        "batch_size": 4,
        "save_steps": 1,
        "parts": {"recovery": {**RECOVERY, "recovery": {"deepest": 8}}, "anchors": ANCHORS},
        "lora": {"rank": 4, "alpha": 8},
        "optimiser": {"learning_rate": 1e-2},
    }
    return TypeAdapter(TuneRecipe).validate_python({**values, **changes})


def joint(saved_model: Path, data: Path, out: Path, **changes: Any) -> TuneRecipe:
    """Return a recipe that trains a `[CLS]` signal too."""
    parts = {
        "refusals": {"sources": {"t": {"path": "triplets.jsonl", "kind": "triplets"}}, "share": 0.2, "per_step": 2},
        "harmful": {
            "sources": {"t": {"path": "triplets.jsonl", "kind": "triplets", "response": "harmful_response"}},
            "share": 0.0,
            "per_step": 2,
        },
        "onsets": {
            "sources": {"t": {"path": "triplets.jsonl", "kind": "triplets", "response": "harmful_response"}},
            "onset": {"openings": {"path": "instructions.jsonl"}, "longest": 12},
            "share": 0.0,
            "per_step": 4,
        },
        "benign": {
            "sources": {"i": {"path": "instructions.jsonl", "request_label": 0, "response_label": 0}},
            "share": 0.8,
            "per_step": 8,
        },
    }
    signal = {"request_weight": 1.0, "response_weight": 1.0, "learning_rate": 0.05}
    return recipe(saved_model, data, out, **{"parts": parts, "signal": signal, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses(folder: Path, name: str = "loss") -> list[float]:
    log = json.loads((folder / "adapter" / "metrics.json").read_text())["log"]
    return [entry[name] for entry in log if name in entry]


class Interrupt(TrainerCallback):
    """Ends a run after two steps, as a crash would."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            control.should_save = True
        if state.global_step > 2:
            raise KeyboardInterrupt


class Count(TrainerCallback):
    """Counts the steps that a run really takes."""

    steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


class SeesCheckpointing(TrainerCallback):
    """Notes whether the model that is trained recomputes its activations."""

    is_on: bool | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_on = bool(kwargs["model"].is_gradient_checkpointing)
