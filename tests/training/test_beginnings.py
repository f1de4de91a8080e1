"""Reading what rows have in common once."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from model.testing import FAMILIES, tiny_lm
from training.beginnings import num_shared, read_once
from training.signal_model import collate_signal
from training.steps import Encoded, EncodedPart, Steps, collate
from training.tune_config import Signal

SETTINGS = Signal(depths=4, windows=(3, 4, 3))
CONTENT = (False, True, True, True, False)


def test_rows_share_what_they_begin_with_until_one_is_learned_or_reads_the_signal() -> None:
    rows = [Encoded((1, 30, 31, 32 + i, 2), tuple(range(40, 46 + 3 * i)), (), CONTENT, 1, i % 2) for i in range(3)]
    steps = Steps([EncodedPart("rows", rows, 1.0, 3, None)], 1, seed=0, signal=SETTINGS)
    found = [steps[i] for i in range(3)]
    ids = collate(found, pad_id=0)["input_ids"]
    masks = collate_signal(found, SETTINGS, {"full_attention": None}).masks
    is_learned = torch.zeros_like(ids, dtype=torch.bool)
    assert num_shared(ids, is_learned, masks) == 3  # the fourth token differs
    alone = {kind: mask[:1] for kind, mask in masks.items()}
    assert num_shared(ids[:1], is_learned[:1], alone) == len(CONTENT)  # the response reads [CLS]
    assert num_shared(ids[:1], is_learned[:1], {}) == ids.shape[1] - 1  # a pass needs a token
    is_learned[1, 3] = True
    assert num_shared(ids, is_learned, masks) == 2  # the third gives the logits of what is learned


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
    arguments = read_once(model, 3, partial(model, input_ids=ids[:1, :12]))
    shared = model(input_ids=ids[:, 12:], attention_mask=mask, **arguments).logits
    is_real = mask[:, 12:].bool()
    assert torch.allclose(shared[is_real], plain[is_real], atol=1e-4)
    for one, other in zip(gradients(shared), gradients(plain), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)
