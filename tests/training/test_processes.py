"""Several processes: each loads to its own device, and together they have the loss and the weights of one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from model.pretrained import Pretrained
from tests.training.tuning import ANCHORS, RECOVERY, joint, losses, recipe, weights
from training import recipe_file
from training.errors import RecipeError
from training.fit import own_device
from training.fsdp import share_frozen
from training.lora import fresh
from training.tune import tune
from training.tune_config import Lora, TuneRecipe

DISTILLED = {**ANCHORS, "is_distilled": True}


def test_weights_spread_over_processes_are_refused(saved_model: Path, data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP by way of accelerate is not supported: start with torchrun"):
        tune(recipe(saved_model, data, tmp_path, steps=1), "")


def test_weights_are_not_shared_with_nobody(saved_model: Path, data: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="fsdp shares weights among several processes: start with torchrun"):
        tune(recipe(saved_model, data, tmp_path, steps=1, fsdp=True), "")


def test_every_process_loads_the_model_to_a_gpu_of_its_own(saved_model: Path, data: Path, tmp_path: Path, monkeypatch):
    chosen = recipe(saved_model, data, tmp_path, device="auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert own_device(chosen) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    for visible, found in ((8, "cuda:3"), (1, "cuda:0")):
        monkeypatch.setattr("torch.cuda.device_count", lambda visible=visible: visible)
        assert own_device(chosen) == found
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert own_device(chosen) == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "anchors", "changes"),
    [
        (recipe, ANCHORS, {}),
        (recipe, DISTILLED, {}),
        (recipe, DISTILLED, {"fsdp": True}),
        (joint, ANCHORS, {"fsdp": True}),
    ],
    ids=["tokens", "distilled", "in shares", "in shares, with the signal"],
)
def test_two_processes_have_the_loss_and_the_weights_of_one(
    saved_model: Path,
    data: Path,
    tmp_path: Path,
    make: Callable[..., TuneRecipe],
    anchors: dict[str, Any],
    changes: dict[str, Any],
):
    parts = {"recovery": {**RECOVERY, "recovery": {"deepest": 8}}, "anchors": anchors}
    tune(make(saved_model, data, tmp_path / "one", batch_size=2, parts=parts), "")
    shared = make(saved_model, data, tmp_path / "two", batch_size=2, parts=parts, **changes)
    recipe_file.dump(shared, tmp_path / "recipe.yaml")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, "-m", "training", "deepen", "--config", str(tmp_path / "recipe.yaml")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    for name in ("loss", *(("loss_sft", "loss_request", "loss_response") if make is joint else ())):
        expected = losses(tmp_path / "one", name)
        assert expected
        assert losses(tmp_path / "two", name) == pytest.approx(expected, rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    kept = sorted((tmp_path / "two" / "run").glob("trainer-*/checkpoint-*"))
    for gone in (kept[-1], tmp_path / "two" / "adapter"):  # as if the last step had not been made
        shutil.rmtree(gone)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    again = weights(tmp_path / "two")
    assert all(torch.equal(two[name], again[name]) for name in two)


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("reads", ["training", "reference"])
def test_frozen_weights_are_whole_only_around_computing_their_layer(tiny: Pretrained, reads: str):
    ids = torch.tensor([[5, 6, 7, 8]])
    before = tiny.model(ids).logits
    model = fresh(tiny, Lora(rank=4, alpha=8), seed=0)
    share_frozen(model, torch.device("cpu"))
    layers = model.get_base_model().model.layers

    def are_shared() -> bool:
        return all(isinstance(one, DTensor) is not one.requires_grad for one in layers.parameters())

    assert are_shared()
    seen = []
    layers[1].mlp.register_forward_hook(lambda *_: seen.append(isinstance(layers[1].mlp.up_proj.weight, DTensor)))
    with torch.no_grad() if reads == "reference" else nullcontext():
        logits = model(input_ids=ids).logits
    assert torch.allclose(logits, before, atol=1e-5)
    assert not any(seen)
    assert are_shared()
    if reads == "training":
        logits.sum().backward()
        assert are_shared()
    assert not any(isinstance(one, DTensor) for name, one in model.named_parameters() if ".layers." not in name)
