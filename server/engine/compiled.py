"""The layers of a model, compiled by torch: what lies between products and attention runs as few loops.

All layers share their code, so one layer is compiled for a single row and one for any more, and the rest take these.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PreTrainedModel

from model.pretrained import cache_folder

logger = logging.getLogger(__name__)

COMPILER = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
"""As torch chooses it."""

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

MOST_KINDS = 64
"""Of layers and inputs that are compiled each by itself; what comes after them runs as it is."""

UNCHANGED = {"EMPTY_NN_MODULE_HOOKS_DICT", "NOT_PRESENT_IN_GENERIC_DICT", "MODULE_MATCH"}
"""What torch would check before every call of a layer: hooks, attributes that are not set, and code, which nobody
changes while a model is served."""

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "emulate_precision_casts": True,  # rounding as in the model itself: the signal was trained on it
    "guard_filter_fn": lambda guards: [not guard.is_global and guard.guard_type not in UNCHANGED for guard in guards],
}

_LIBRARY = torch.library.Library("ballast", "DEF")  # type: ignore[no-untyped-call]  # untyped there


def operation(schema: str, run: Callable[..., Tensor], shape: Callable[..., Tensor], kind: str) -> None:
    """Define `torch.ops.ballast.NAME`, which the compiler calls and does not look into.

    Args:
        schema: name, parameters and result, as torch writes them.
        run: does it.
        shape: returns something of the shape of the result.
        kind: of the tensors that it takes, a dispatch key.
    """
    name = _LIBRARY.define(schema)  # type: ignore[no-untyped-call]  # untyped there
    _LIBRARY.impl(name, run, kind)  # type: ignore[no-untyped-call]  # untyped there
    torch.library.register_fake(f"ballast::{name}", shape, lib=_LIBRARY)


def compile_layers(model: PreTrainedModel) -> None:
    """Have the decoder layers of a model, where they are found, compiled when they next run.

    What was compiled before, on this machine, is read from the cache folder. A layer that cannot be compiled runs as it
    is; without a C++ compiler all do.
    """
    if shutil.which(COMPILER) is None:
        logger.info("the model's layers are not compiled, as there is no %s", COMPILER)
        return
    if os.environ.get(CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():  # torch sets it to that itself
        os.environ[CACHE_VARIABLE] = str(cache_folder() / "compiled")
    torch._dynamo.config.recompile_limit = MOST_KINDS
    torch._dynamo.config.suppress_errors = True
    torch.compiler.set_stance("default")
    for layer in layers_of(model):
        for module in layer.modules():
            if module is not layer:
                _drop_capturing_hooks(module)
        layer.forward = torch.compile(layer.forward, options=OPTIONS)


def keep_compiled() -> None:
    """Compile nothing from now on: a layer that gets something of another kind runs as it is, and holds up nobody."""
    torch.compiler.set_stance("eager_on_recompile")


def as_it_was(model: PreTrainedModel) -> None:
    """Have the layers of a model run as they are."""
    for layer in layers_of(model):
        vars(layer).pop("forward", None)


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the decoder layers of a model; none if they are not found."""
    num_layers = model.config.get_text_config().num_hidden_layers
    return next((list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers), [])


def _drop_capturing_hooks(module: nn.Module) -> None:
    """Take away transformers' hooks for attention weights, which nobody asks for and a compiler cannot follow."""
    for number, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__name__", "") == "output_capturing_hook":
            del module._forward_hooks[number]
