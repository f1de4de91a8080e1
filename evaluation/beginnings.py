"""The first tokens of harmful responses, which a prefill attack gives."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from evaluation.rows import Row


def beginnings(rows: Iterable[Row], depth: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Row, list[int]]]:
    """Return every row with the first `depth` tokens of its response; rows whose response is shorter are left out."""
    found = [(row, tokenizer.encode(row.response or "", add_special_tokens=False)) for row in rows]
    return [(row, ids[:depth]) for row, ids in found if len(ids) >= depth]
