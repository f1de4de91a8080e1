"""`[CLS]` with cached keys and values equals one plain pass, position by position, on every family."""

import pytest
import torch

from model.attention import Span, Windows, window
from model.cls_signal import ClsCache, ClsPass, ClsSignal, feed, sliding_windows
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


BEFORE = Span(0, range(0))


def span(number: int) -> Span:
    return Span(number, window(number, WINDOWS, is_malicious=False))


def start(model, content=CONTENT, request=REQUEST) -> tuple[ClsCache, ClsPass]:
    cache = ClsCache(content)
    return cache, feed(model, signal(), cache, request, [BEFORE])


def decode(model, covered: set[int], **choices: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits at every response token and the states of every assessment, token by token."""
    cache = ClsCache(CONTENT)
    copies = [feed(model, signal(), cache, REQUEST, [BEFORE], **choices).copies]
    logits = []
    for number, token in enumerate(RESPONSE, start=1):
        found = feed(model, signal(), cache, [token], [span(number)] if number in covered else [], **choices)
        logits.append(found.logits)
        copies.append(found.copies)
    return torch.stack(logits), torch.cat(copies)


def at_once(model, covered: set[int], **choices: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one pass: final states become logits, as a pass returns only the newest."""
    spans = [BEFORE, *(span(number) for number in sorted(covered))]
    found = feed(model, signal(), ClsCache(CONTENT), [*REQUEST, *RESPONSE], spans, **choices)
    return model.get_output_embeddings()(found.hidden_states[-1][len(REQUEST) :]), found.copies


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_cached_decoding_equals_one_pass_with_a_copy_per_assessment(family: str, moves: bool):
    model = tiny_lm(family)
    covered = {1, 2, 3, 5, 8, 13, 29}
    one, other = decode(model, covered, moves=moves), at_once(model, covered, moves=moves)
    assert torch.allclose(one[0], other[0], atol=1e-4)
    assert torch.allclose(one[1], other[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_request_tokens_have_the_plain_models_logits(family: str):
    model = tiny_lm(family)
    assert torch.allclose(start(model)[1].logits, model(torch.tensor([REQUEST])).logits[0, -1], atol=1e-4)


@torch.inference_mode()
def test_a_request_may_be_fed_in_pieces():
    model = tiny_lm()
    whole, pieces = start(model)[1], ClsCache(CONTENT)
    feed(model, signal(), pieces, REQUEST[:4])
    found = feed(model, signal(), pieces, REQUEST[4:], [BEFORE])
    assert torch.allclose(found.logits, whole.logits, atol=1e-5)
    assert torch.allclose(found.copies, whole.copies, atol=1e-5)


@torch.inference_mode()
def test_a_pass_may_assess_without_a_new_token():
    model = tiny_lm()
    at_once, later = start(model)[0], start(model)[0]
    found = feed(model, signal(), at_once, RESPONSE[:3], [span(3)])
    feed(model, signal(), later, RESPONSE[:3])
    assert torch.allclose(feed(model, signal(), later, [], [span(3)]).copies, found.copies, atol=1e-5)
    assert at_once.length == later.length == len(REQUEST) + 3
    for one, other in zip(at_once.layers, later.layers, strict=True):
        assert torch.allclose(one.keys[:, :, 0], other.keys[:, :, 0], atol=1e-5)


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
        spans = [BEFORE, span(len(response))]
        return feed(model, signal(), ClsCache(CONTENT), [*request, *response], spans).copies[1]

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
    kept, cropped = start(model)[0], start(model)[0]
    for cache in (kept, cropped):
        feed(model, signal(), cache, RESPONSE[:5])
    feed(model, signal(), cropped, RESPONSE[5:9], [Span(9, range(5, 9))])  # `[CLS]` has seen what is withdrawn
    cropped.shorten(len(REQUEST) + 5)
    for cache in (kept, cropped):
        feed(model, signal(), cache, [7], [span(6)])
    one, other = (feed(model, signal(), cache, [8]) for cache in (kept, cropped))
    assert torch.allclose(one.logits, other.logits, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "phi3"])
@torch.inference_mode()
def test_a_request_longer_than_the_sliding_window_is_read_as_the_plain_model_reads_it(family: str):
    model, request = tiny_lm(family), list(range(3, 43))
    assert sliding_windows(model) == {"sliding_attention": 16}
    found = start(model, [True] * 40, request)[1].logits
    assert torch.allclose(found, model(torch.tensor([request])).logits[0, -1], atol=1e-4)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
@torch.inference_mode()
def test_layers_with_and_without_a_window_have_masks_of_their_own(family: str, moves: bool):
    model, covered, request = mixed_lm(family), {1, 2, 5, 13, 29}, list(range(3, 43))
    assert sliding_windows(model) == {"full_attention": None, "sliding_attention": 16}
    found = start(model, [True] * 40, request)[1].logits
    assert torch.allclose(found, model(torch.tensor([request])).logits[0, -1], atol=1e-4)
    one, other = decode(model, covered, moves=moves), at_once(model, covered, moves=moves)
    assert torch.allclose(one[1], other[1], atol=1e-4)


def mixed_lm(family: str):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    more = {"use_sliding_window": True} if family == "qwen2" else {"head_dim": 8}
    return tiny_lm(family, sliding_window=16, layer_types=kinds, **more)


def test_a_kind_of_layer_without_a_mask_is_refused():
    model = tiny_lm("mistral")
    model.config.layer_types = ["full_attention", "linear_attention", "sliding_attention"]
    with pytest.raises(ModelError, match=r"layers of \['linear_attention'\]"):
        sliding_windows(model)
    model.config.sliding_window = None
    with pytest.raises(ModelError, match=r"layers of \['linear_attention'\]"):
        sliding_windows(model)


def test_the_head_gives_two_logits_in_float32_whatever_the_states():
    assert signal()(torch.randn(3, 32).bfloat16()).shape == (3, 2)
    assert ClsSignal(32, hidden=8)(torch.randn(1, 32).bfloat16()).dtype is torch.float32
