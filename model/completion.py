"""Continue a batch of prompts with the plain model: nothing is scored, and nothing acts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from model.pretrained import Pretrained


@torch.inference_mode()
def complete(pretrained: Pretrained, prompts: Sequence[Sequence[int]], max_tokens: int, **sampling: Any) -> Tensor:
    """Return what follows each prompt, (B, T); after the token that ends a response it is padded.

    Args:
        pretrained: the model.
        prompts: token ids; the shorter ones are padded on the left.
        max_tokens: most tokens to add.
        sampling: settings of transformers' `GenerationConfig`; without any it is greedy.
    """
    longest, pad = max(map(len, prompts)), pretrained.pad_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])  # (B, S)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (B, S)
    model: Any = pretrained.model
    config = GenerationConfig(  # type: ignore[no-untyped-call]  # untyped in transformers
        **{"do_sample": False, **sampling},
        max_new_tokens=max_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(pretrained.eos_ids) or None,
    )
    output: Tensor = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
    )
    return output[:, longest:]
