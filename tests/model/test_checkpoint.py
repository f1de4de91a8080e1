import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CONFIG_FILE, HEAD_FILE, attach, default_for, find, fingerprint_weights, load, save
from model.cls_signal import FILE as CLS_FILE
from model.cls_signal import ClsSignal
from model.config import ClsConfig, TokenHeadConfig
from model.errors import BaseMismatch, CheckpointError
from model.pretrained import DEFAULT_MODEL, Pretrained
from model.safety_head import TokenHead
from model.testing import byte_tokenizer, tiny_config, tiny_guarded_lm, tiny_lm


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the checkpoint of the tiny model."""
    lm = tiny_guarded_lm()
    save(tmp_path / "checkpoint", lm.head, lm.config)
    return tmp_path / "checkpoint"


@pytest.fixture
def pretrained() -> Pretrained:
    return Pretrained("tiny", tiny_lm(), byte_tokenizer())


def test_what_is_saved_is_loaded(folder):
    lm = tiny_guarded_lm()
    head, _, config = load(folder)
    assert config == lm.config
    features = torch.randn(5, 2 * 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(head.response(features), lm.head.response(features))
    assert torch.equal(head.request(features), lm.head.request(features))


def test_whether_refusals_are_redrawn_travels_and_can_be_switched_off(tmp_path, pretrained):
    lm = tiny_guarded_lm(redraw_below=0.25)
    save(tmp_path, lm.head, lm.config)
    assert attach(pretrained, tmp_path).config.redraw_below == 0.25
    assert attach(pretrained, tmp_path, redraws=False).config.redraw_below == 0.0
    text = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(text.replace('"redraw_below": 0.25', '"redraw_below": 0.95'))
    with pytest.raises(CheckpointError, match=r"redraw_below 0.95 must be from 0 to request\.block, 0\.9"):
        load(tmp_path)


def test_a_checkpoint_that_redraws_nothing_is_what_it_was(folder):
    assert "redraw_below" not in (folder / CONFIG_FILE).read_text()
    assert load(folder).config.redraw_below == 0.0


def test_a_head_with_a_hidden_layer_and_its_standardisation_travel(tmp_path):
    config = tiny_config(tiny_lm(), byte_tokenizer(), token_head=TokenHeadConfig((1, -1), 32, 4))
    head = TokenHead(config.token_head)
    head.request.mean.fill_(3.0)
    save(tmp_path, head, config)
    loaded, _, _ = load(tmp_path)
    assert loaded.request.mean.tolist() == [3.0] * 2 * 64
    assert loaded.response.out.weight.shape == (1, 4)


def test_a_half_precision_head_is_read_in_float32(tmp_path):
    lm = tiny_guarded_lm()
    save(tmp_path, lm.head.bfloat16(), lm.config)
    assert load(tmp_path).head.request.out.weight.dtype == torch.float32


def test_saving_leaves_nothing_but_the_two_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, HEAD_FILE]


def test_a_write_over_an_older_checkpoint_that_fails_leaves_no_valid_one(folder):
    # Otherwise the older thresholds would be read beside the newer weights.
    (folder / HEAD_FILE).unlink()
    (folder / HEAD_FILE).mkdir()
    lm = tiny_guarded_lm()
    with pytest.raises(Exception, match="directory"):
        save(folder, lm.head, lm.config)
    assert not (folder / CONFIG_FILE).exists()


@pytest.mark.parametrize("file", [CONFIG_FILE, HEAD_FILE])
def test_a_missing_file_is_named(folder, file: str):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_weights_are_an_error_that_names_the_folder(folder, kept: int):
    path = folder / HEAD_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cannot read the checkpoint") as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_a_truncated_configuration_is_an_error(folder):
    path = folder / CONFIG_FILE
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(folder)


def test_a_configuration_that_is_not_text_is_an_error(folder):
    (folder / CONFIG_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot read"):
        load(folder)


def test_weights_of_another_shape_than_configured_are_an_error(folder):
    raw = json.loads((folder / CONFIG_FILE).read_text())
    raw["token_head"]["width"] = 64
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"size mismatch"):
        load(folder)


def test_a_missing_tensor_is_named(folder):
    tensors = load_file(folder / HEAD_FILE)
    del tensors["response.out.bias"]
    save_file(tensors, folder / HEAD_FILE)
    with pytest.raises(CheckpointError, match=r"out\.bias"):
        load(folder)


def test_a_checkpoint_attaches_to_the_model_it_was_made_for(folder, pretrained):
    lm = attach(pretrained, folder)
    assert lm.config == load(folder).config
    assert lm.head is not None


def test_a_wrong_base_is_named_with_both_fingerprints(folder, pretrained):
    other = tiny_lm(seed=1)
    found = fingerprint_weights(other)[:12]
    expected = fingerprint_weights(pretrained.model)[:12]
    with pytest.raises(BaseMismatch, match=rf"\({expected}\), but other is {found}"):
        attach(Pretrained("other", other, byte_tokenizer()), folder)


def test_a_wrong_template_is_an_error(folder, pretrained):
    pretrained.tokenizer.chat_template += " "
    with pytest.raises(BaseMismatch, match=r"was calibrated with chat template \w{12}, but tiny has \w{12}"):
        attach(pretrained, folder)


def test_a_wrong_width_is_named_with_the_models(folder, pretrained):
    config = replace(load(folder).config, token_head=TokenHeadConfig((-1,), 48, 0))
    save(folder, TokenHead(config.token_head), config)
    with pytest.raises(CheckpointError, match="width 48, the model's are 32 wide"):
        attach(pretrained, folder)


@pytest.mark.parametrize("layer", [4, -2])
def test_a_layer_that_the_model_does_not_have_is_named(folder, pretrained, layer: int):
    config = replace(load(folder).config, token_head=TokenHeadConfig((layer,), 32, 0))
    save(folder, TokenHead(config.token_head), config)
    with pytest.raises(CheckpointError, match=rf"layers \[{layer}\]; the model has -1 \(final\) and 0 to 3"):
        attach(pretrained, folder)


def test_the_fingerprint_is_the_same_in_every_precision():
    assert fingerprint_weights(tiny_lm().bfloat16()) == fingerprint_weights(tiny_lm())


def test_the_fingerprint_changes_with_the_weights():
    model = tiny_lm()
    before = fingerprint_weights(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert fingerprint_weights(model) != before


def test_a_checkpoint_is_found_by_its_folder(folder):
    assert find(str(folder)) == folder


def test_an_unknown_checkpoint_is_named_with_the_shipped_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"no safety_config\.json in .*nowhere.*; shipped checkpoints are \["):
        find(str(tmp_path / "nowhere"))


def test_the_default_model_has_a_default_checkpoint_and_others_have_none():
    assert default_for(DEFAULT_MODEL) == "smollm2-135m/all-rows"
    assert default_for("other/model") is None


def test_another_precision_than_that_of_the_calibration_is_said(folder, pretrained, caplog):
    attach(pretrained, folder)
    assert caplog.text == ""
    attach(Pretrained("tiny", pretrained.model.bfloat16(), pretrained.tokenizer), folder)
    assert "calibrated in float32, the model runs in bfloat16" in caplog.text


# With a `[CLS]` signal


@pytest.mark.parametrize("changes", [{}, {"token_head": None}])
def test_a_cls_signal_is_saved_and_attached(tmp_path, pretrained, changes):
    lm = tiny_guarded_lm(cls=ClsConfig(schedule="periodic-4"), **changes)
    save(tmp_path, lm.head, lm.config, lm.cls)
    assert (tmp_path / HEAD_FILE).exists() is (lm.head is not None)
    attached = attach(pretrained, tmp_path)
    assert torch.equal(attached.cls.embedding, lm.cls.embedding)
    assert (attached.head is None) is (lm.head is None)
    assert attached.reads_cls
    assert not attach(pretrained, tmp_path, reads_cls=False).reads_cls
    assert attached.schedule.interval(0) == 4
    assert attach(pretrained, tmp_path, schedule="every").schedule.interval(0) == 1


def test_a_later_checkpoint_leaves_no_signal_of_an_earlier_one(tmp_path):
    lm = tiny_guarded_lm(cls=ClsConfig())
    save(tmp_path, lm.head, lm.config, lm.cls)
    save(tmp_path, lm.head, replace(lm.config, cls=None))
    assert not (tmp_path / CLS_FILE).exists()


def test_a_write_that_fails_leaves_the_checkpoint_before_and_nothing_else(tmp_path, monkeypatch):
    lm = tiny_guarded_lm(cls=ClsConfig())
    save(tmp_path, lm.head, lm.config, lm.cls)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        lm.head.request.out.bias += 1.0
    monkeypatch.setattr("model.checkpoint.cls_signal.save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, lm.head, lm.config, lm.cls)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_missing_cls_signal_is_named(tmp_path):
    lm = tiny_guarded_lm(cls=ClsConfig())
    save(tmp_path, lm.head, lm.config, lm.cls)
    (tmp_path / CLS_FILE).unlink()
    with pytest.raises(CheckpointError, match=CLS_FILE):
        load(tmp_path)


def test_a_cls_signal_of_another_width_is_refused(tmp_path, pretrained):
    lm = tiny_guarded_lm(cls=ClsConfig())
    save(tmp_path, lm.head, lm.config, ClsSignal(48))
    with pytest.raises(CheckpointError, match=r"\[CLS\] is 48 wide, the model's are 32"):
        attach(pretrained, tmp_path)
