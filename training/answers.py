"""The served model's own answers to benign prompts: harmless text in the very style that will be judged."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from transformers import set_seed

from model.chat import ChatTemplate
from model.checkpoint import fingerprint_weights
from model.completion import complete
from model.pretrained import Pretrained
from training.config import Answers
from training.progress import tracked
from training.rows import Row
from training.shards import digest, write_atomically

Encoded = tuple[int, ...]


def answer(
    pretrained: Pretrained,
    rows: Sequence[Row],
    settings: Answers,
    *,
    max_request_tokens: int,
    cache: Path,
    seed: int,
    with_end: bool = False,
) -> list[str]:
    """Return one sampled answer per row, in order.

    Batches are cached one by one: an interrupted run goes on where it was, a finished one reads.

    Args:
        pretrained: the model that will be served.
        rows: conversations to answer; their own responses are not read.
        settings: temperature, tokens and batch size.
        max_request_tokens: longer requests lose their beginning.
        cache: folder of the batches.
        seed: of the sampling; each batch draws from a seed made of it and of the batch.
        with_end: keep the text of the token that ends a response, so that an answer without it was cut.
    """
    template = ChatTemplate(pretrained.tokenizer)
    prompts = [template.encode(row.messages).request[-max_request_tokens:] for row in rows]
    ends = sorted(pretrained.eos_ids)
    identity = [fingerprint_weights(pretrained.model), str(pretrained.model.dtype), asdict(settings), seed, ends]
    if with_end:
        identity.append("with end")
    answers = [""] * len(rows)
    for batch in tracked(list(_batches(prompts, settings.batch_size)), "own answers", unit=len):
        ids = [prompts[index] for index in batch]
        name = digest(identity, ids)[:32]
        path = cache / "answers" / f"{name}.json"
        if not path.is_file():
            texts = _generate(pretrained, ids, settings, int(name[:8], 16), with_end)
            write_atomically(path, partial(_dump, texts))
        for index, text in zip(batch, json.loads(path.read_text(encoding="utf-8")), strict=True):
            answers[index] = text
    return answers


def _batches(prompts: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Yield indices of prompts of like length."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _generate(
    pretrained: Pretrained, prompts: Sequence[Encoded], settings: Answers, seed: int, with_end: bool
) -> list[str]:
    """Return sampled answers to one batch."""
    tokenizer = pretrained.tokenizer
    with torch.random.fork_rng():
        set_seed(seed)  # `generate` takes no torch.Generator
        made = complete(
            pretrained, prompts, settings.max_tokens, do_sample=True, temperature=settings.temperature, top_k=0
        )  # (B, T)
    ends, rows = pretrained.eos_ids, made.tolist()
    said = [list(takewhile(lambda token: token not in ends, row)) for row in rows]  # not every end is a special token
    texts = [str(text) for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    if not with_end:
        return texts
    lengths = zip(texts, map(len, said), map(len, rows), strict=True)
    return [text + str(tokenizer.eos_token) if length < whole else text for text, length, whole in lengths]


def _dump(texts: list[str], path: Path) -> None:
    path.write_text(json.dumps(texts), encoding="utf-8")
