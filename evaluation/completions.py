"""Greedy completions of many prompts, in batches of like length."""

from collections.abc import Iterator, Sequence

from rich.progress import track

from model.completion import complete
from model.pretrained import Pretrained


def completions(
    pretrained: Pretrained, prompts: Sequence[Sequence[int]], *, max_tokens: int, batch_size: int
) -> Iterator[tuple[int, str]]:
    """Yield each prompt's number and what follows it as text, the shortest prompts first."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in track(range(0, len(order), batch_size), "completions"):
        batch = order[start : start + batch_size]
        made = complete(pretrained, [prompts[number] for number in batch], max_tokens)
        yield from zip(batch, pretrained.tokenizer.batch_decode(made, skip_special_tokens=True), strict=True)
