"""Log-probabilities of the model that training starts from, computed once for the constrained objective."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.objectives import IGNORED, token_logprobs
from training.output_head import predicting
from training.progress import tracked
from training.shards import digest, write_atomically
from training.steps import Encoded, Example, RowKey, collate

Reference = dict[RowKey, Tensor]
"""By row: log pi_aligned of every response token, (T,)."""


@torch.no_grad()  # not inference mode, in which weights in shares may not be gathered
def reference_logprobs(
    model: nn.Module, rows: Mapping[RowKey, Encoded], *, pad_id: int, batch_size: int, cache: Path, identity: str
) -> Reference:
    """Return the log-probabilities of the rows' responses, from `cache` if they are there.

    Args:
        model: the model before the first step; read in evaluation mode and left in it.
        rows: those that training will read.
        pad_id: token that fills the ends of short rows.
        batch_size: rows of one forward pass.
        cache: folder of the file.
        identity: of the model with its precision; another one is computed anew.
    """
    path = cache / "reference" / f"{digest(identity, [[*key, *row] for key, row in rows.items()])[:32]}.safetensors"
    if not path.is_file():
        found = _compute(model.eval(), rows, pad_id, batch_size)
        tensors = {f"{name}/{number}": values for (name, number), values in found.items()}
        write_atomically(path, partial(save_file, tensors))
    loaded = load_file(path)
    return {(name, number): loaded[f"{name}/{number}"] for name, number in rows}


def _compute(model: nn.Module, rows: Mapping[RowKey, Encoded], pad_id: int, batch_size: int) -> Reference:
    device = next(model.parameters()).device
    keys = sorted(rows, key=lambda key: len(rows[key].request) + len(rows[key].response))
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    found: Reference = {}
    for batch in tracked(batches, "reference", unit=len):
        examples = [_example(key, rows[key]) for key in batch]
        inputs = {name: values.to(device) for name, values in collate(examples, pad_id).items()}
        is_learned = inputs["labels"] != IGNORED  # (B, T); N of them
        with predicting(model, is_learned):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits  # (N, V)
        logprobs = token_logprobs(logits, inputs["labels"][is_learned]).cpu()  # (N,)
        each = torch.split(logprobs, is_learned.sum(dim=1).tolist())
        found |= {key: values.clone() for key, values in zip(batch, each, strict=True)}
    return found


def _example(key: RowKey, row: Encoded) -> Example:
    return Example((*row.request, *row.response), len(row.request), 1.0, key)
