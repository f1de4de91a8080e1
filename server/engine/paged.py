"""How sequences of a model run together: over pages, with compiled layers and recorded passes, as far as each works."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.chat import Message
from model.errors import origin
from model.guarded_lm import GuardedLM
from server.engine.compiled import as_it_was, compile_layers, keep_compiled, layers_of
from server.engine.kv_cache import num_pages_of
from server.engine.native import multiply_of
from server.engine.packed import pack
from server.engine.runner import SAME, PagedRunner, cosine_of
from server.engine.seats import Runner, Solos

logger = logging.getLogger(__name__)

CPU_BYTES = 2 << 30
"""Of the cache, unless told otherwise. It is touched only as far as it is used."""
GPU_SHARE = 0.8
"""Of the free memory, which the cache takes unless told otherwise."""


def paged(lm: GuardedLM, num_bytes: int | None = None, *, compiles: bool = False, is_int8: bool = False) -> Runner:
    """Return what runs sequences together, or one by one where the model's attention cannot be changed.

    Args:
        lm: the model; its linear layers are packed, and its attention changed.
        num_bytes: of the cache; None takes `CPU_BYTES`, or `GPU_SHARE` of the free memory.
        compiles: its layers are compiled too, and its passes of few rows recorded, where that works.
        is_int8: weights of its linear layers are rounded to 8 bits, as `pack` takes it.
    """
    was = lm.model.config.get_text_config()._attn_implementation
    ids = lm.chat.encode([Message("user", "Hello")]).request

    def run() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = lm.model(torch.tensor([ids], device=lm.model.device)).logits[0, -1]
        return logits

    expected = run()
    num_products = pack(lm.model, run, is_int8=is_int8)
    if is_int8:
        expected = _rounded(expected, run(), num_products)
    try:
        runner = PagedRunner(lm, num_pages_of(len(ids)) + 1)
        runner.check(ids, expected)
    except Exception as error:
        logger.warning("sequences run one by one, as the model's attention cannot be replaced: %s", origin(error))
        lm.model.set_attn_implementation(was)
        return Solos(lm)
    if num_bytes is None:
        num_bytes = CPU_BYTES
        if lm.model.device.type == "cuda":
            num_bytes = int(GPU_SHARE * torch.cuda.mem_get_info(lm.model.device)[0])
    runner.resize(num_bytes)
    if compiles:
        layers = _compile(runner, lm, ids, expected)
        _record(runner, lm, layers, ids, expected)
    return runner


def _rounded(before: Tensor, after: Tensor, num_products: int) -> Tensor:
    """Return the logits of a model whose weights have been rounded, and say where that is not what was asked for."""
    if not num_products:
        logger.warning("no layer of the model could be rounded to 8 bits")
    elif (cosine := cosine_of(before, after)) < SAME:
        logger.warning("weights in 8 bits change what the model says: its logits have a cosine of %.3f", cosine)
    return after


def _compile(runner: PagedRunner, lm: GuardedLM, ids: tuple[int, ...], expected: Tensor) -> Sequence[nn.Module]:
    """Compile the layers of a model, and return them; none where they run as they are."""
    try:
        compile_layers(lm.model)
        runner.check(ids, expected)
        keep_compiled()
    except Exception as error:
        logger.warning("the model's layers run as they are, as they cannot be compiled: %s", origin(error))
        as_it_was(lm.model)
        runner.reset()  # it holds what they gave
        return []
    return layers_of(lm.model)


def _record(
    runner: PagedRunner, lm: GuardedLM, layers: Sequence[nn.Module], ids: tuple[int, ...], expected: Tensor
) -> None:
    """Record passes of few rows: on a GPU, or where compiled layers and products can be noted."""
    is_gpu = lm.model.device.type == "cuda"
    if not is_gpu and not (layers and lm.model.dtype == torch.bfloat16 and multiply_of() is not None):
        return
    try:
        runner.record(() if is_gpu else layers)
        runner.check(ids, expected)
    except Exception as error:
        logger.warning("passes are not recorded, as they cannot be: %s", origin(error))
        if runner.recorded is not None:
            runner.recorded.close()
            runner.recorded = None
        runner.reset()
