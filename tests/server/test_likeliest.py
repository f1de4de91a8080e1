"""The likeliest token of each row, as torch finds it."""

import os
import shutil

import pytest
import torch

from server.engine.library import library
from server.engine.native import likeliest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1, 15, 1024, 1025, 49_152])
def test_it_is_the_first_of_the_highest_logits(dtype: torch.dtype, size: int):
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(33, size, generator=generator).to(dtype)
    logits[1] = -3.0  # the first of equals
    logits[2] = -torch.inf
    logits[3] = logits[3] - 1000.0
    assert likeliest(logits) == logits.max(dim=-1).indices.tolist()
    assert likeliest(logits.T) == logits.T.max(dim=-1).indices.tolist()
    assert likeliest(logits[:0]) == []


def test_both_zeros_are_as_likely():
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]).bfloat16()
    assert likeliest(logits) == [1, 1]


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no compiler")
def test_it_is_compiled_where_there_is_a_compiler():
    assert library("likeliest") is not None
