"""From held-out rows to thresholds: the risks are exactly those that the policy acts on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import Side, Thresholds
from model.safety_head import TokenHead
from model.trace import logit_of
from training.config import Acting, HeadRecipe
from training.errors import DataError
from training.head import SIDES, pad
from training.metrics import (
    Array,
    Bin,
    Quality,
    Rate,
    balanced_weights,
    block_threshold,
    flag_threshold,
    quality,
    reliability,
    wilson,
)
from training.risk import request_risks, response_risks
from training.rows import Row
from training.states import RowStates, States

BATCH = 256


@dataclass(frozen=True)
class Scored:
    """Risks and labels of one side on held-out rows, one value per row."""

    risks: Array
    labels: Array
    groups: NDArray[np.str_]
    is_validation: NDArray[np.bool_]


@dataclass(frozen=True)
class SideReport:
    """One side's thresholds, what they were set on, and the quality per source."""

    thresholds: Thresholds
    block_sources: tuple[str, ...]
    false_positives: Rate
    """Of the benign rows that set `block`."""
    flag_f1: float
    """Best F1 on validation rows, each source having its weight."""
    per_source: dict[str, Quality]
    reliability: list[Bin]


@dataclass(frozen=True)
class Calibration:
    """Thresholds of both sides, the onset, and up to which request risk a refusal of the model's own is redrawn."""

    request: SideReport
    response: SideReport
    onset: float
    redraw_below: float
    request_scores: Scored
    response_scores: Scored
    request_share: float = 1.0
    """Weight of the request logit of `[CLS]` beside that of the token head, where both are there."""
    response_share: float = 1.0
    """The same of the response logit."""


SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of `[CLS]` that are tried beside a token head."""


def calibrate(
    head: TokenHead | None,
    rows: Sequence[Row],
    states: States,
    recipe: HeadRecipe,
    shares: tuple[float, float] | None = None,
    queries: Array | None = None,
) -> Calibration:
    """Return thresholds from the rows of the parts `validation` and `calibration`.

    Args:
        head: the token head; None where `[CLS]` is alone.
        rows: all rows, or those that are held out.
        states: theirs.
        recipe: the policy that will act on the risks.
        shares: weights of `[CLS]` in the risk of requests and of responses. None takes those with the best F1 on
            validation rows where there is a token head too, and 1 where there is not.
        queries: the highest smoothed logit of each row's query, (N,), where a head reads every token of it.

    Raises:
        DataError: if no benign or no harmful held-out row is there to set a threshold.
    """
    has_both = head is not None and len(states) > 0 and states[0].cls_response is not None
    tried = SHARES if has_both else (1.0,)
    found = {share: score(head, rows, states, recipe, share, queries) for share in shares or tried}
    sides: list[tuple[float, Scored, SideReport]] = []
    for place, side in enumerate(SIDES):
        reports = {
            share: _report(both[place], side, recipe)
            for share, both in found.items()
            if shares is None or share == shares[place]
        }
        best = max(reports, key=lambda share: reports[share].flag_f1)
        sides.append((best, found[best][place], reports[best]))
    (request_share, request, request_report), (response_share, response, response_report) = sides
    return Calibration(
        request_report,
        response_report,
        onset(response_report.thresholds),
        _redraw_below(request, request_report, recipe.acting.redraw_share),
        request,
        response,
        request_share,
        response_share,
    )


def check(rows: Sequence[Row], recipe: HeadRecipe) -> None:
    """Refuse rows that can set no thresholds, before anything is computed of them.

    Raises:
        DataError: as `calibrate`.
    """
    for side in SIDES:
        labels = [row.request_label if side == "request" else row.response_label for row in rows]
        held_out = [i for i, label in enumerate(labels) if label is not None and rows[i].part != "train"]
        _report(_scored(np.zeros(len(rows)), rows, held_out, side), side, recipe)


@torch.inference_mode()
def score(
    head: TokenHead | None,
    rows: Sequence[Row],
    states: States,
    recipe: HeadRecipe,
    share: float = 1.0,
    queries: Array | None = None,
) -> tuple[Scored, Scored]:
    """Return request risks and response risks of all labelled held-out rows.

    A prompt counts once per source and label on the request side.

    Args:
        head: the token head; None where `[CLS]` is alone.
        rows: all rows.
        states: theirs.
        recipe: the policy that will act on the risks.
        share: weight of `[CLS]` beside the token head.
        queries: as `calibrate` takes them.
    """
    held_out = [index for index, row in enumerate(rows) if row.part != "train"]
    of_request, of_response = np.zeros(len(rows)), np.zeros(len(rows))
    for start in range(0, len(held_out), BATCH):
        chosen = held_out[start : start + BATCH]
        batch = [states[index] for index in chosen]
        logits = _request_logits(head, batch, share).double()
        if queries is not None:
            logits = torch.maximum(logits, torch.from_numpy(queries[chosen]))
        of_request[chosen] = request_risks(logits).numpy()
        of_response[chosen] = _response_risks(head, batch, share, recipe.acting)
    requests = {(rows[i].group, rows[i].key, rows[i].request_label): i for i in reversed(held_out)}
    request_rows = [i for i in sorted(requests.values()) if rows[i].request_label is not None]
    response_rows = [i for i in held_out if rows[i].response_label is not None and len(states[i].response)]
    return (
        _scored(of_request, rows, request_rows, "request"),
        _scored(of_response, rows, response_rows, "response"),
    )


def _request_logits(head: TokenHead | None, batch: Sequence[RowStates], share: float) -> Tensor:
    """Return the request logit of each row, (B,)."""
    cls = torch.tensor([one.cls_request for one in batch])  # (B,)
    if head is None:
        return cls
    token: Tensor = head.request(torch.stack([one.request for one in batch]).float())
    return (1.0 - share) * token + share * cls if batch[0].cls_response is not None else token


def _response_risks(head: TokenHead | None, batch: Sequence[RowStates], share: float, acting: Acting) -> Array:
    """Return the response risk of each row, (B,), from a token head, from `[CLS]`, or from both."""
    features, mask = pad(batch)
    cls = [one.cls_response for one in batch if one.cls_response is not None]
    if head is None:
        logits = torch.cat(cls)  # (sum of T,)
    else:
        logits = head.response(features)
        if cls and share > 0.0:  # without a share it may not have been assessed
            logits = (1.0 - share) * logits + share * torch.cat(cls)
    padded = torch.zeros(mask.shape).masked_scatter(mask, logits)  # (B, T)
    lengths = mask.sum(dim=1).clamp(min=1)  # rows without a response are left out later
    found: Array = response_risks(padded, lengths, acting.smoothing, acting.patience).numpy()
    return found


def onset(response: Thresholds) -> float:
    """Return the risk whose logit is halfway between `flag` and `block`, and never over `block`."""
    middle = (logit_of(response.flag) + logit_of(response.block)) / 2
    return min(response.block, 1 / (1 + math.exp(-middle)))


def _redraw_below(scored: Scored, report: SideReport, share: float | None) -> float:
    """Return the risk that this share of the benign requests does not exceed, at most `block`; 0 for none."""
    if share is None:
        return 0.0
    return min(report.thresholds.block, block_threshold(_benign(scored, report.block_sources), 1.0 - share))


def _benign(scored: Scored, block_sources: Sequence[str]) -> Array:
    """Return the risks of the benign rows that set thresholds of acting."""
    benign: Array = scored.risks[(scored.labels == 0) & np.isin(scored.groups, block_sources)]
    return benign


def _scored(risks: Array, rows: Sequence[Row], chosen: Sequence[int], side: Side) -> Scored:
    labels = [rows[i].request_label if side == "request" else rows[i].response_label for i in chosen]
    return Scored(
        risks[chosen],
        np.array(labels, dtype=np.float64),
        np.array([rows[i].group for i in chosen], dtype=np.str_),
        np.array([rows[i].part == "validation" for i in chosen], dtype=np.bool_),
    )


def best_flag(scored: Scored, recipe: HeadRecipe) -> float:
    """Return the threshold with the best F1 on validation rows, each source having its weight.

    Raises:
        ValueError: if no harmful validation row has weight.
    """
    validation = scored.is_validation
    return flag_threshold(scored.risks[validation], scored.labels[validation], _weights(scored, recipe))


def _weights(scored: Scored, recipe: HeadRecipe) -> Array:
    """Return the weight of each validation row where the best F1 is sought."""
    weights = {name: source.flag_weight for name, source in recipe.sources.items()}
    return balanced_weights(scored.groups[scored.is_validation], weights)


def _report(scored: Scored, side: Side, recipe: HeadRecipe) -> SideReport:
    block_sources = tuple(name for name, source in recipe.sources.items() if side in source.sets_block)
    benign = _benign(scored, block_sources)
    validation = scored.is_validation
    weights = _weights(scored, recipe)
    risks, labels = scored.risks[validation], scored.labels[validation]
    target = getattr(recipe.acting, f"{side}_false_positives")
    try:
        thresholds = Thresholds(block=block_threshold(benign, target), flag=best_flag(scored, recipe))
    except ValueError as error:
        under = " under a permissive licence" if recipe.is_permissive_only else ""
        raise DataError(f"cannot calibrate the {side} side on sources {list(block_sources)}{under}: {error}") from error
    harmful, flagged = weights * labels, weights * (risks > thresholds.flag)
    return SideReport(
        thresholds=thresholds,
        block_sources=block_sources,
        false_positives=wilson(int((benign > thresholds.block).sum()), len(benign)),
        flag_f1=float(2 * (flagged * labels).sum() / (flagged.sum() + harmful.sum())),
        per_source={
            str(name): quality(
                scored.risks[scored.groups == name],
                scored.labels[scored.groups == name],
                block=thresholds.block,
                flag=thresholds.flag,
            )
            for name in dict.fromkeys(scored.groups.tolist())
        },
        reliability=reliability(risks, labels),
    )
