import shutil
from dataclasses import replace

import pytest
import torch

from model.checkpoint import load, save
from model.errors import CheckpointError, WeightsNotFound
from model.testing import write_tiny
from server.loading import load_model
from server.settings import Settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_a_model_is_loaded_with_its_checkpoint_in_the_precision_of_the_calibration(tiny):
    model, checkpoint = tiny
    lm = load_model(Settings(model=str(model), checkpoint=str(checkpoint), device="cpu"))
    assert lm.config is not None
    assert lm.model.dtype == torch.float32


def test_a_precision_can_be_chosen(tiny):
    model, checkpoint = tiny
    lm = load_model(Settings(model=str(model), checkpoint=str(checkpoint), device="cpu", dtype="bfloat16"))
    assert lm.model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("quota", "environment", "expected"),
    [("150000 100000", "", 2), ("20000 100000", "", 1), ("max 100000", "", 7), ("150000 100000", "7", 7), ("", "", 7)],
)
def test_a_container_s_quota_of_cpus_limits_the_threads(tiny, tmp_path, monkeypatch, quota, environment, expected):
    (tmp_path / "cpu.max").write_text(quota)
    chosen = []
    monkeypatch.setattr("server.loading.CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("torch.set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    model, checkpoint = tiny
    load_model(Settings(model=str(model), checkpoint=str(checkpoint), device="cpu"))
    assert (chosen or [7]) == [expected]


def test_redrawing_can_be_switched_off(tiny, tmp_path):
    model, checkpoint = tiny
    redrawing = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, redrawing)
    head, _, config = load(checkpoint)
    save(redrawing, head, replace(config, redraw_below=0.25))
    for is_on, below in ((True, 0.25), (False, 0.0)):
        settings = Settings(model=str(model), checkpoint=str(redrawing), device="cpu", redraw=is_on)
        assert load_model(settings).config.redraw_below == below


def test_a_model_is_served_without_a_signal_only_if_asked_for(tiny):
    model = str(tiny[0])
    off = {"input_mode": "off", "output_mode": "off"}
    assert load_model(Settings(model=model, checkpoint="none", device="cpu", **off)).config is None
    with pytest.raises(CheckpointError, match="no safety checkpoint ships for"):
        load_model(Settings(model=model, **off))


@pytest.mark.parametrize("checkpoint", [None, "/no/such/checkpoint"])
def test_a_model_that_does_not_exist_is_said_before_its_checkpoint_is_looked_for(checkpoint):
    with pytest.raises(WeightsNotFound, match="the model /no/such/model does not exist"):
        load_model(Settings(model="/no/such/model", checkpoint=checkpoint, device="cpu"))
