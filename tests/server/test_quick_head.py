"""The compiled token head: the numbers of the plain one."""

import os
import shutil

import pytest
import torch

from model.config import TokenHeadConfig
from model.safety_head import Passage, TokenHead, extend_each
from server.engine.quick_head import MOST_ROWS, extend_rows, quicken

pytestmark = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no compiler")


def heads(hidden: int, width: int) -> tuple[TokenHead, TokenHead]:
    """Return the same random head twice."""
    generator = torch.Generator().manual_seed(hidden)
    config = TokenHeadConfig((0, -1), width, hidden, reads_query=True)
    found = TokenHead(config), TokenHead(config)
    for one in found:
        for side in (one.request, one.response, one.query):
            side.mean.normal_(generator=generator)
            side.std.uniform_(0.5, 2.0, generator=generator)
    found[1].load_state_dict(found[0].state_dict())
    return found


@torch.inference_mode()
@pytest.mark.parametrize("hidden", [0, 1, 5, 8, 128])
@pytest.mark.parametrize("width", [3, 16, 40])
def test_logits_are_those_of_the_plain_head(hidden: int, width: int):
    plain, quick = heads(hidden, width)
    quicken(quick)
    assert [("forward" in vars(one)) for one in (quick.request, quick.query)] == [hidden > 0] * 2
    for num_rows in (1, 2, 3, 4, 5, 8, 33, MOST_ROWS + 1):
        features = torch.randn(num_rows, 4 * width, generator=torch.Generator().manual_seed(num_rows))
        for side in ("request", "response"):
            torch.testing.assert_close(quick.of(side)(features), plain.of(side)(features), atol=2e-5, rtol=1e-5)
        states = features[:, : 2 * width]
        torch.testing.assert_close(quick.query(states), plain.query(states), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_passages_grow_as_they_do_one_by_one(dtype):
    generator = torch.Generator().manual_seed(0)
    quick, plain = ([Passage() for _ in range(3)] for _ in range(2))
    for rows in ([4, 0, 2], [1, 3, 4], [0, 1, 2]):
        states = [torch.randn(5, 7, generator=generator).to(dtype) for _ in range(2)]
        found = extend_rows(quick, states, rows)
        expected = extend_each(plain, torch.cat([state[rows] for state in states], dim=-1))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        for one, other in zip(quick, plain, strict=True):
            assert len(one) == len(other)
            torch.testing.assert_close(one.total, other.total, atol=1e-6, rtol=1e-5)


def test_states_that_are_not_numbers_give_no_number():
    _, quick = heads(8, 4)
    quicken(quick)
    with torch.inference_mode():
        assert quick.request(torch.full((1, 16), torch.nan)).isnan().all()
