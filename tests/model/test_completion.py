"""A padded batch of continuations."""

import torch

from model.completion import complete
from model.pretrained import Pretrained
from model.testing import byte_tokenizer, tiny_lm

PROMPTS = [(1, 40, 41), (1, 50, 51, 52, 53, 54), (1, 60)]


def test_a_batch_says_what_each_prompt_gives_alone():
    tiny = Pretrained("tiny", tiny_lm(), byte_tokenizer())
    together = complete(tiny, PROMPTS, 6)
    assert together.shape == (3, 6)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert torch.equal(row, complete(tiny, [prompt], 6)[0])


def test_it_is_greedy_unless_sampling_is_asked_for():
    tiny = Pretrained("tiny", tiny_lm(), byte_tokenizer())
    assert torch.equal(complete(tiny, PROMPTS, 6), complete(tiny, PROMPTS, 6))
    assert not torch.equal(*(complete(tiny, PROMPTS, 6, do_sample=True, temperature=9.0, top_k=0) for _ in range(2)))
