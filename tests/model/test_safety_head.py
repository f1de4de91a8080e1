import math

import pytest
import torch

from model.config import TokenHeadConfig
from model.safety_head import TokenHead


def head(weight: list[list[float]], bias: list[float], *, layers: tuple[int, ...] = (-1,)) -> TokenHead:
    made = TokenHead(TokenHeadConfig(layers=layers, width=len(weight[0]) // len(layers), hidden=0))
    made.requires_grad_(False)
    for part, row, shift in zip((made.request, made.response), weight, bias, strict=True):
        part.out.weight.copy_(torch.tensor([row]))
        part.out.bias.fill_(shift)
    return made


def test_a_linear_head_by_hand():
    # Request: 1 * 2 + 0 * 3 + 0.5; response: 0 * 2 + 2 * 3 - 1.
    output = head([[1, 0], [0, 2]], [0.5, -1])(torch.tensor([[2.0, 3.0]]))
    assert output.request.tolist() == [2.5]
    assert output.response.tolist() == [5.0]


def test_states_are_standardised_first():
    # (5 - 1) / 2 = 2 and (3 - 3) / 4 = 0.
    made = head([[1, 1], [1, -1]], [0, 0])
    made.request.mean.copy_(torch.tensor([1.0, 3.0]))
    made.request.std.copy_(torch.tensor([2.0, 4.0]))
    output = made(torch.tensor([[5.0, 3.0]]))
    assert output.request.tolist() == [2.0]
    assert output.response.tolist() == [2.0]  # 5 - 3: its own scale is still the identity


def test_a_hidden_layer_goes_through_gelu():
    made = TokenHead(TokenHeadConfig(layers=(-1,), width=1, hidden=1)).requires_grad_(False)
    for part, weight in ((made.request, 1.0), (made.response, 2.0)):
        part.hidden.weight.fill_(1.0)
        part.hidden.bias.zero_()
        part.out.weight.fill_(weight)
        part.out.bias.zero_()
    gelu = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # gelu(1) = 1 * Phi(1)
    output = made(torch.tensor([[1.0]]))
    assert (output.request.item(), output.response.item()) == pytest.approx((gelu, 2 * gelu))


def test_half_precision_states_are_read_in_float32():
    states = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    output = head([[1.0001, 0], [0, 1]], [0, 0])(states)
    assert output.request.dtype == torch.float32
    assert output.request.item() == pytest.approx(1.0001, abs=1e-6)  # bfloat16 would round it to 1


def test_each_position_is_read_on_its_own():
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    both = head([[1, 2], [3, 4]], [0, 0])(states)
    alone = head([[1, 2], [3, 4]], [0, 0])(states[1:])
    assert both.request[1] == alone.request[0]
    assert both.request.shape == both.response.shape == (2,)


def test_several_layers_stand_side_by_side():
    made = head([[1, 0, 10, 0], [0, 1, 0, 10]], [0, 0], layers=(0, -1))
    output = made(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert (output.request.item(), output.response.item()) == (31, 42)
