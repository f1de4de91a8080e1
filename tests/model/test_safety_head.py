import math

import pytest
import torch

from model.config import TokenHeadConfig
from model.safety_head import Passage, TokenHead, extend_each


def head(weight: list[list[float]], bias: list[float], *, layers: tuple[int, ...] = (-1,)) -> TokenHead:
    """Return a linear head; each row of `weight` has the weights of the states, then those of their mean."""
    made = TokenHead(TokenHeadConfig(layers=layers, width=len(weight[0]) // len(layers) // 2, hidden=0))
    made.requires_grad_(False)
    for part, row, shift in zip((made.request, made.response), weight, bias, strict=True):
        part.out.weight.copy_(torch.tensor([row]))
        part.out.bias.fill_(shift)
    return made


# A passage


def test_each_state_stands_beside_the_mean_of_all_up_to_it():
    # Means: 2; (2 + 4) / 2 = 3; (2 + 4 - 9) / 3 = -1. And 1; (1 + 0) / 2; (1 + 0 + 5) / 3 = 2.
    features = Passage().extend(torch.tensor([[2.0, 1.0], [4.0, 0.0], [-9.0, 5.0]]))
    assert features.tolist() == [[2, 1, 2, 1], [4, 0, 3, 0.5], [-9, 5, -1, 2]]


@pytest.mark.parametrize("sizes", [[1] * 12, [5, 7], [1, 10, 1], [12]])
def test_a_passage_in_pieces_is_the_passage_at_once(sizes: list[int]):
    states = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    passage = Passage()
    in_pieces = torch.cat([passage.extend(piece) for piece in states.split(sizes)])
    torch.testing.assert_close(in_pieces, Passage().extend(states), atol=1e-6, rtol=0)
    assert len(passage) == 12


def test_what_is_read_at_the_last_token_alone_is_what_is_read_at_it_among_all():
    states = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    one, other = Passage(), Passage()
    for part in states.split([4, 1, 4]):
        torch.testing.assert_close(one.extend_to_last(part), other.extend(part)[-1:], atol=1e-6, rtol=0)
        assert len(one) == len(other)


def test_many_passages_grow_by_one_token_each_as_each_does_alone():
    states = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0))
    together, alone = ([Passage() for _ in range(3)] for _ in range(2))
    together[1].extend(states[0, 1:2])
    alone[1].extend(states[0, 1:2])  # it has begun, the others have not
    for newest in states[1:]:
        found = extend_each(together, newest)
        assert torch.equal(
            found, torch.cat([passage.extend(one[None]) for passage, one in zip(alone, newest, strict=True)])
        )
    assert [len(passage) for passage in together] == [3, 4, 3]


def test_the_length_of_a_passage_is_that_of_all_its_pieces():
    passage = Passage()
    assert len(passage) == 0
    passage.extend(torch.ones(3, 2))
    passage.extend(torch.ones(1, 2))
    assert len(passage) == 4


def test_a_passage_knows_nothing_of_another():
    Passage().extend(torch.full((4, 2), 9.0))
    assert Passage().extend(torch.ones(1, 2)).tolist() == [[1, 1, 1, 1]]


def test_extending_changes_no_state_and_nothing_that_was_given_before():
    passage, states = Passage(), torch.tensor([[1.0], [3.0]])
    before = passage.extend(states)
    passage.extend(torch.tensor([[8.0]]))
    assert states.tolist() == [[1], [3]]
    assert before.tolist() == [[1, 1], [3, 2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_of_half_precision_states_is_taken_in_float32(dtype: torch.dtype):
    # 1000 ones and a 0: 1000 / 1001. In bfloat16 a sum of ones stays at 256, in float16 the quotient is 0.999.
    passage = Passage()
    passage.extend(torch.ones(1000, 1, dtype=dtype))
    features = passage.extend(torch.zeros(1, 1, dtype=dtype))
    assert features.dtype == torch.float32
    assert features.tolist() == [[0.0, pytest.approx(1000 / 1001, abs=1e-6)]]


# The head


def test_a_linear_head_by_hand():
    # Request: 1 * 2 + 0 * 3 + 5 * 4 + 0 * 6 + 0.5; response: 0 * 2 + 2 * 3 + 0 * 4 + 1 * 6 - 1.
    made, features = head([[1, 0, 5, 0], [0, 2, 0, 1]], [0.5, -1]), torch.tensor([[2.0, 3.0, 4.0, 6.0]])
    assert made.request(features).tolist() == [22.5]
    assert made.response(features).tolist() == [11.0]


def test_each_side_has_its_own_head():
    made = head([[1, 0], [0, 1]], [0, 0])
    assert made.of("request") is made.request
    assert made.of("response") is made.response


def test_features_are_standardised_first():
    # (5 - 1) / 2 = 2, (3 - 3) / 4 = 0, and for the means (9 - 1) / 8 = 1 and (6 - 2) / 1 = 4.
    made = head([[1, 1, 1, 1], [1, -1, 0, 0]], [0, 0])
    made.request.mean.copy_(torch.tensor([1.0, 3.0, 1.0, 2.0]))
    made.request.std.copy_(torch.tensor([2.0, 4.0, 8.0, 1.0]))
    features = torch.tensor([[5.0, 3.0, 9.0, 6.0]])
    assert made.request(features).tolist() == [7.0]
    assert made.response(features).tolist() == [2.0]  # 5 - 3: its own scale is still the identity


def test_a_hidden_layer_goes_through_gelu():
    made = TokenHead(TokenHeadConfig(layers=(-1,), width=1, hidden=1)).requires_grad_(False)
    for part, weight in ((made.request, 1.0), (made.response, 2.0)):
        part.hidden.weight.copy_(torch.tensor([[1.0, 0.5]]))
        part.hidden.bias.zero_()
        part.out.weight.fill_(weight)
        part.out.bias.zero_()
    gelu = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # gelu(1) = 1 * Phi(1)
    features = torch.tensor([[0.5, 1.0]])  # 1 * 0.5 + 0.5 * 1 = 1
    assert (made.request(features).item(), made.response(features).item()) == pytest.approx((gelu, 2 * gelu))


def test_half_precision_states_are_read_in_float32():
    features = Passage().extend(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    logits = head([[1.0001, 0, 0, 0], [0, 1, 0, 0]], [0, 0]).request(features)
    assert logits.dtype == torch.float32
    assert logits.item() == pytest.approx(1.0001, abs=1e-6)  # bfloat16 would round it to 1


def test_each_position_is_read_on_its_own():
    features = torch.tensor([[1.0, 2.0, 5.0, 6.0], [3.0, 4.0, 7.0, 8.0]])
    made = head([[1, 2, 3, 4], [3, 4, 5, 6]], [0, 0])
    for side in (made.request, made.response):
        assert side(features)[1] == side(features[1:])[0]
        assert side(features).shape == (2,)


def test_several_layers_stand_side_by_side():
    made = head([[1, 0, 10, 0, 0, 0, 0, 0], [0, 1, 0, 10, 0, 0, 0, 100]], [0, 0], layers=(0, -1))
    features = Passage().extend(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert made.request(features).item() == 31
    assert made.response(features).item() == 2 + 10 * 4 + 100 * 4
