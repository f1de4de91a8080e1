"""Attention over slots: compiled and in PyTorch, the same as over keys that lie side by side."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.testing import tiny_guarded_lm
from server.engine.attention import Reads, SlotAttention, _zeros
from server.engine.attention import _attention_of_layer as attend
from server.engine.library import library
from server.engine.native import attend_of, keep_of


class Layer:
    layer_idx = 0


def made(heads: int, key_heads: int, size: int, dtype: torch.dtype, num_rows: int = 6, num_slots: int = 40):
    """Return an attention whose slots all hold something, queries, and what three of the rows read."""
    generator = torch.Generator().manual_seed(heads)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    attention = SlotAttention(tiny_guarded_lm().model, num_slots)
    keys, values = random(1, key_heads, num_slots, size), random(1, key_heads, num_slots, size)
    slots = torch.arange(num_slots)
    attention.prepare(slots, {None: Reads.of({}, [], slots.device)})
    attend(attention.number, Layer, random(1, heads, num_slots, size), keys, values, None)
    lists = {row: torch.randperm(num_slots, generator=generator)[:length] for row, length in ((0, 1), (2, 17), (5, 40))}
    attention.prepare(slots[:num_rows], {None: Reads.of(lists, [], slots.device)})
    query = random(1, heads, num_rows, size)
    some = keys[:, :, :num_rows], values[:, :, :num_rows]  # what is there already
    return attention, query, (keys, values), some, lists


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 8), (8, 1, 40)])
@pytest.mark.parametrize("is_native", [True, False])
def test_a_row_reads_the_slots_of_its_list(shape, dtype, is_native: bool):
    if is_native and shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("there is no compiler")
    attention, query, (keys, values), some, lists = made(*shape, dtype)
    attention._native = attend_of(dtype) if is_native else None
    assert is_native is (attention._native is not None)
    found, _ = attend(attention.number, Layer, query, *some, None, scaling=0.3)
    groups = shape[0] // shape[1]
    for row, slots in lists.items():
        k, v = (store[0, :, slots].float().repeat_interleave(groups, dim=0) for store in (keys, values))
        weights = (query[0, :, row, None].float() @ k.transpose(1, 2) * 0.3).softmax(-1)
        assert torch.allclose(found[0, row].float(), (weights @ v)[:, 0], atol=1e-5 if dtype is torch.float32 else 2e-2)


def test_without_a_compiler_there_is_no_compiled_attention(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("BALLAST_CACHE", str(tmp_path))
    library.cache_clear()
    try:
        assert attend_of(torch.float32) is None
    finally:
        library.cache_clear()  # and nothing more here: what is not compiled now is not compiled in later tests


def test_there_is_no_compiled_attention_in_half_precision():
    assert attend_of(torch.float16) is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted from there")
def test_stores_take_memory_as_far_as_they_are_written():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    store = _zeros(torch.empty(0), (1, 1 << 26, 1))  # 256 MiB
    assert resident() - before < 64 << 20
    assert not store[0, ::4096].any()


@pytest.mark.skipif(keep_of() is None, reason="there is no compiler")
def test_as_many_rows_are_kept_as_there_are_slots():
    keep = keep_of()
    key, store = torch.ones(2, 3, 4), torch.zeros(2, 5, 4)
    with pytest.raises(ValueError, match="3 rows are kept in 2 slots"):
        keep(key, key, store, store.clone(), torch.tensor([0, 1]))
    assert not store.any()
