"""`[CLS]` with cached keys and values equals one plain pass, position by position, on every family."""

import pytest
import torch

from model.attention import Windows, window
from model.cls_signal import ClsCache, ClsSignal, forward_training, sliding_window
from model.errors import ModelError
from model.testing import FAMILIES, tiny_lm

REQUEST = [1, 30, 31, 32, 33, 34, 35, 36, 37, 2, 40]
CONTENT = [False, *[True] * 8, False, False]
RESPONSE = list(range(50, 80))
WINDOWS = Windows(r2=4)


def signal(width: int = 32) -> ClsSignal:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(4)
        made = ClsSignal(width)
        torch.nn.init.normal_(made.embedding, std=0.5)
    return made


def decode(model, covered: set[int], *, is_read: bool = True, moves: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits at every response token and the states of every assessment, token by token."""
    cache = ClsCache(model, signal(), CONTENT, is_read=is_read, moves=moves)
    states = [cache.feed(REQUEST, read=range(0)).state]
    logits = []
    for number, token in enumerate(RESPONSE, start=1):
        read = window(number, WINDOWS, is_malicious=False) if number in covered else None
        found = cache.feed([token], read)
        logits.append(found.logits)
        if found.state is not None:
            states.append(found.state)
    return torch.stack(logits), torch.stack(states)


def plain(model, covered: set[int], *, is_read: bool = True, moves: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one pass without a cache."""
    lengths = [0, *sorted(covered)]
    assessments = [(length, window(length, WINDOWS, is_malicious=False)) for length in lengths]
    logits, states = forward_training(
        model, signal(), [*REQUEST, *RESPONSE], CONTENT, assessments, is_read=is_read, moves=moves
    )
    return logits[len(REQUEST) :], states


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_cached_decoding_equals_one_pass_with_a_copy_per_assessment(family: str, moves: bool):
    model = tiny_lm(family)
    covered = {1, 2, 3, 5, 8, 13, 29}
    one, other = decode(model, covered, moves=moves), plain(model, covered, moves=moves)
    assert torch.allclose(one[0], other[0], atol=1e-4)
    assert torch.allclose(one[1], other[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_request_tokens_have_the_plain_models_logits(family: str):
    model = tiny_lm(family)
    found = ClsCache(model, signal(), CONTENT).feed(REQUEST, read=range(0)).logits
    assert torch.allclose(found, model(torch.tensor([REQUEST])).logits[0, -1], atol=1e-4)


@torch.inference_mode()
def test_a_request_may_be_fed_in_pieces():
    model = tiny_lm()
    whole, pieces = (ClsCache(model, signal(), CONTENT) for _ in range(2))
    pieces.feed(REQUEST[:4])
    one, other = whole.feed(REQUEST, read=range(0)), pieces.feed(REQUEST[4:], read=range(0))
    assert one.state is not None
    assert torch.allclose(one.logits, other.logits, atol=1e-5)
    assert torch.allclose(one.state, other.state, atol=1e-5)


@torch.inference_mode()
def test_response_tokens_read_the_signal_and_not_where_reading_is_off():
    model = tiny_lm()
    read, unread = decode(model, {1, 5}), decode(model, {1, 5}, is_read=False)
    bare = model(torch.tensor([[*REQUEST, *RESPONSE]])).logits[0, len(REQUEST) :]
    assert torch.allclose(unread[0], bare, atol=1e-4)
    assert not torch.allclose(read[0], bare, atol=1e-3)


@torch.inference_mode()
def test_an_assessment_reads_only_the_text_of_the_request_and_its_window():
    model = tiny_lm()

    def state(request: list[int], response: list[int]) -> torch.Tensor:
        length = len(response)
        covers = [(0, range(0)), (length, window(length, WINDOWS, is_malicious=False))]
        return forward_training(model, signal(), [*request, *response], CONTENT, covers)[1][1]

    # One layer deep: what the row itself does not read can still reach it through tokens that it reads.
    model.model.layers = model.model.layers[:1]
    before = state(REQUEST, RESPONSE)
    assert torch.allclose(state([9, *REQUEST[1:]], RESPONSE), before)
    assert torch.allclose(state(REQUEST, [9, *RESPONSE[1:]]), before)
    assert not torch.allclose(state(REQUEST, [*RESPONSE[:-2], 9, RESPONSE[-1]]), before)
    assert not torch.allclose(state([REQUEST[0], 9, *REQUEST[2:]], RESPONSE), before)


@torch.inference_mode()
def test_after_a_rollback_and_an_assessment_nothing_is_left_of_what_was_withdrawn():
    model = tiny_lm()
    kept, cropped = (ClsCache(model, signal(), CONTENT) for _ in range(2))
    for cache in (kept, cropped):
        cache.feed(REQUEST, read=range(0))
        cache.feed(RESPONSE[:5])
    cropped.feed(RESPONSE[5:9], read=range(5, 9))  # `[CLS]` has seen what is withdrawn
    cropped.crop(len(REQUEST) + 5)
    for cache in (kept, cropped):
        cache.feed([7], read=range(2, 6))
    one, other = (cache.feed([8]) for cache in (kept, cropped))
    assert torch.allclose(one.logits, other.logits, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
@torch.inference_mode()
def test_a_request_longer_than_the_sliding_window_is_read_as_the_plain_model_reads_it(family: str):
    model, request = tiny_lm(family), list(range(3, 43))
    assert sliding_window(model) == 16
    found = ClsCache(model, signal(), [True] * 40).feed(request, read=range(0)).logits
    assert torch.allclose(found, model(torch.tensor([request])).logits[0, -1], atol=1e-4)


def test_a_model_that_mixes_kinds_of_layers_is_refused():
    model = tiny_lm("mistral")
    model.config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="layers mix"):
        sliding_window(model)


def test_the_head_gives_two_logits_in_float32_whatever_the_states():
    assert signal()(torch.randn(3, 32).bfloat16()).shape == (3, 2)
    assert ClsSignal(32, hidden=8)(torch.randn(1, 32).bfloat16()).dtype is torch.float32
