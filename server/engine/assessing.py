"""What the heads say of passes that ran together: they read the states of all sequences at once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from model.config import Side
from model.guarded_lm import Assessed, GuardedLM
from model.passes import Pass, Passed
from server.engine.graph_heads import Said
from server.engine.kv_cache import Rows, Seat
from server.engine.native import likeliest
from server.engine.quick_head import extend_rows

SIDES: tuple[Side, ...] = ("request", "response")
Some = TypeVar("Some", bound=Sequence[object] | Tensor)


class Ran(NamedTuple):
    """What a model gave of the R rows of B passes."""

    logits: Tensor
    """Of some rows, (N, V), on the CPU."""
    row_of: Sequence[int]
    """Which of them is that of the newest token, by pass; of no use where it has none."""
    states: tuple[Tensor, ...] | None
    """Of every row by layer, (1, R, D)."""
    said: Said | None = None
    """What the heads said in the pass itself."""


Batch = Sequence[tuple[Seat, Pass]]


def assess(lm: GuardedLM, batch: Batch, laid: Sequence[Rows], ran: Ran) -> list[Passed]:
    """Return what came of each pass, and note in its seat what the heads read."""
    token, cls, seconds = _token_logits(lm, batch, laid, ran), _cls_logits(lm, batch, laid, ran), 0.0
    found: list[dict[int, list[float]]] = []
    for logits, some_seconds in (*token, *cls):
        found.append(logits)
        seconds += some_seconds
    tokens = likeliest(ran.logits) if ran.said is None else []
    passed = []
    for number, (rows, row) in enumerate(zip(laid, ran.row_of, strict=True)):
        of_request, of_query, of_response, cls_request, cls_response = (some.get(number, []) for some in found)
        passed.append(
            Passed(
                ran.logits[row] if rows.num_tokens else torch.empty(0),
                request=of_request[0] if of_request else None,
                query=of_query,
                response=of_response,
                cls_request=cls_request[0] if cls_request else None,
                cls_response=cls_response,
                seconds=seconds / len(batch),
                likeliest=(ran.said.likeliest(row) if ran.said else tokens[row]) if rows.num_tokens else None,
            )
        )
    return passed


Logits = tuple[dict[int, list[float]], float]
"""By number of the pass, and the seconds that they took."""


def _token_logits(lm: GuardedLM, batch: Batch, laid: Sequence[Rows], ran: Ran) -> tuple[Logits, Logits, Logits]:
    """Return what the token head says of requests, of the new tokens of queries, and of responses."""
    of_request: dict[int, Tensor] = {}
    of_query: dict[int, Tensor] = {}
    of_response: dict[int, Tensor] = {}
    said_of, seconds_of_said = _say_one_more(lm, batch, laid, ran)
    for number, ((seat, asked), rows) in enumerate(zip(batch, laid, strict=True)):
        if number in said_of:
            continue
        end, num_read = rows.first + rows.num_tokens, asked.num_query + asked.num_response
        if lm.head is not None and ran.states is not None and num_read and not is_one_more(asked):
            states = torch.cat([ran.states[layer][0, end - num_read : end] for layer in lm.head.config.layers], dim=-1)
            newest = None
            if asked.num_query:
                of_query[number] = states[: asked.num_query]
                newest = seat.query.extend_to_last(of_query[number])
            if asked.num_response:
                seat.newest = seat.response.extend(states[asked.num_query :])
            if asked.asks_request and newest is not None:
                of_request[number] = newest
        if asked.num_asked and seat.newest is not None:
            of_response[number] = seat.newest[-asked.num_asked :]
    request = _together(lambda some: lm.assess("request", torch.cat(some)), of_request)
    query = _together(lambda some: lm.assess_query(torch.cat(some)), of_query if lm.reads_query else {})
    response, seconds = _together(lambda some: lm.assess("response", torch.cat(some)), of_response)
    return request, query, (response | said_of, seconds + seconds_of_said)


def _cls_logits(lm: GuardedLM, batch: Batch, laid: Sequence[Rows], ran: Ran) -> list[Logits]:
    """Return what `[CLS]` says of requests, and of responses."""
    asked_of: dict[Side, dict[int, list[int]]] = {side: {} for side in SIDES}
    for number, ((_, asked), rows) in enumerate(zip(batch, laid, strict=True)):
        copies = list(range(rows.first + rows.num_tokens, rows.stop))
        is_first = bool(copies) and asked.spans[0].covers == 0
        if is_first and asked.asks_request:
            asked_of["request"][number] = copies[:1]
        if copies[is_first:]:
            asked_of["response"][number] = copies[is_first:]
    if (said := ran.said) is not None:
        return [
            ({number: [said.cls(side, row) for row in rows] for number, rows in asked_of[side].items()}, 0.0)
            for side in SIDES
        ]
    found = []
    for side in SIDES:

        def of(some: Sequence[list[int]], side: Side = side) -> Assessed:
            assert ran.states is not None
            return lm.assess_cls(side, ran.states[-1][0, [*chain(*some)]])

        found.append(_together(of, asked_of[side]))
    return found


def _together(say: Callable[[list[Some]], Assessed], asked: Mapping[int, Some]) -> Logits:
    """Return each pass's part of what a head says of all of them at once."""
    if not asked:
        return {}, 0.0
    found = say(list(asked.values()))
    logits = iter(found.logits)
    return {number: list(islice(logits, len(some))) for number, some in asked.items()}, found.seconds


def _say_one_more(lm: GuardedLM, batch: Batch, laid: Sequence[Rows], ran: Ran) -> Logits:
    """Read the states of all responses that have one more token; return what the head says of those it is asked of."""
    if lm.head is None or ran.states is None:
        return {}, 0.0
    found = [
        (number, seat, rows.first, asked.num_asked > 0)
        for number, ((seat, asked), rows) in enumerate(zip(batch, laid, strict=True))
        if is_one_more(asked)
    ]
    if not found:
        return {}, 0.0
    if (said := ran.said) is not None:
        for _, seat, row, _ in found:
            seat.response.grow(said.totals[row])
            seat.newest = said.features[row : row + 1]
        return {number: [said.response(row)] for number, _, row, is_asked in found if is_asked}, 0.0
    states = [ran.states[layer][0] for layer in lm.head.config.layers]
    features = extend_rows([seat.response for _, seat, _, _ in found], states, [row for _, _, row, _ in found])
    for place, (_, seat, _, _) in enumerate(found):
        seat.newest = features[place : place + 1]
    if not any(is_asked for *_, is_asked in found):
        return {}, 0.0
    assessed = lm.assess("response", features)
    logits = zip(found, assessed.logits, strict=True)
    return {number: [logit] for (number, _, _, is_asked), logit in logits if is_asked}, assessed.seconds


def is_one_more(asked: Pass) -> bool:
    """Tell whether the token head reads the one token of a pass, of the response."""
    return len(asked.token_ids) == asked.num_response == 1 and asked.num_query == 0
