"""Reading what rows have in common once."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM

from model.testing import FAMILIES, tiny_lm
from training.common_start import can_share, num_common, read_once
from training.signal_model import collate_signal
from training.steps import Encoded, EncodedPart, Steps, collate
from training.tune_config import Signal

SETTINGS = Signal(depths=4, windows=(3, 4, 3))
CONTENT = (False, True, True, True, False)


def nothing_of(ids: Tensor) -> Tensor:
    return torch.zeros_like(ids, dtype=torch.bool)


def test_rows_share_what_they_begin_with_until_one_is_learned_or_reads_the_signal() -> None:
    rows = [Encoded((1, 30, 31, 32 + i, 2), tuple(range(40, 46 + 3 * i)), (), CONTENT, 1, i % 2) for i in range(3)]
    steps = Steps([EncodedPart("rows", rows, 1.0, 3, None)], 1, seed=0, signal=SETTINGS)
    found = [steps[i] for i in range(3)]
    ids = collate(found, pad_id=0)["input_ids"]
    masks = collate_signal(found, SETTINGS, {"full_attention": None}).masks
    is_learned = nothing_of(ids)
    assert num_common(ids, is_learned, masks) == 3  # the fourth token differs
    twice = {kind: mask[[0, 0]] for kind, mask in masks.items()}
    assert num_common(ids[[0, 0]], is_learned[:2], twice) == len(CONTENT)  # the response reads [CLS]
    assert num_common(ids[[0, 0]], is_learned[:2], {}) == ids.shape[1] - 1  # a pass needs a token
    assert num_common(ids[:1], is_learned[:1], {}) == 0
    is_learned[1, 3] = True
    assert num_common(ids, is_learned, masks) == 2  # the third gives the logits of what is learned


def test_padding_is_shared_with_no_token_that_looks_like_it() -> None:
    rows = [Encoded((1, 30, 31, 32, 2), tuple(range(40, 44 + 3 * i)), (), CONTENT) for i in range(2)]
    unread = Signal(depths=4, windows=(3, 4, 3), is_read=False)
    steps = Steps([EncodedPart("rows", rows, 0.0, 2, None)], 1, seed=0, signal=unread)
    found = [steps[i] for i in range(2)]
    ids = collate(found, pad_id=44)["input_ids"]  # the token after those that both have
    masks = collate_signal(found, unread, {"full_attention": None}).masks
    assert (ids[0] == ids[1]).sum() == 10
    assert num_common(ids, nothing_of(ids), masks) == 9


def test_what_keeps_other_things_than_keys_and_values_is_not_shared() -> None:
    assert all(can_share(tiny_lm(family)) for family in FAMILIES)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert not can_share(MambaForCausalLM(MambaConfig(**sizes)))
    assert not can_share(Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"])))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_their_beginning_have_the_logits_and_the_gradient_that_they_have_alone(family: str) -> None:
    model = get_peft_model(tiny_lm(family), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat(
        [
            torch.randint(3, 250, (1, 12), generator=generator).expand(3, -1),
            torch.randint(3, 250, (3, 9), generator=generator),
        ],
        dim=1,
    )
    mask = torch.ones_like(ids)
    mask[0, 17:] = 0

    def gradients(logits: Tensor) -> list[Tensor]:
        weights = mask[:, 12:, None] * torch.linspace(-1, 1, logits.shape[-1])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad((logits * weights).sum(), trained))

    plain = model(input_ids=ids, attention_mask=mask).logits[:, 12:]
    passes: list[tuple[int, ...]] = []

    def run(rows: slice, tokens: slice, **cached: Any) -> Any:
        passes.append(tuple(ids[rows, tokens].shape))
        return model(input_ids=ids[rows, tokens], attention_mask=mask[rows, : tokens.stop], **cached)

    shared = read_once(model, run, num_rows=3, num_common=12).logits
    assert passes == [(1, 12), (3, 9)]
    is_real = mask[:, 12:].bool()
    assert torch.allclose(shared[is_real], plain[is_real], atol=1e-4)
    for one, other in zip(gradients(shared), gradients(plain), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)
