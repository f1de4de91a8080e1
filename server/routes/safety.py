"""`POST /v1/safety/score`: the risks of a conversation, generating nothing."""

import uuid

from fastapi import APIRouter, Request

from model.chat import EncodedPrompt
from model.config import SafetyConfig, Thresholds
from model.guarded_lm import GuardedLM
from model.trace import Trace
from server.admission import encode
from server.answer import token_texts
from server.departure import unless_gone
from server.errors import Forbidden, HeadFailed, invalid
from server.protocol.safety import (
    Flagged,
    RiskThresholds,
    ScoredToken,
    ScoreRequest,
    ScoreResponse,
    ScoreThresholds,
)
from server.service import JSON_BODY, TheAccess, TheModel, TheService

router = APIRouter(tags=["safety"], dependencies=[JSON_BODY])


@router.post(
    "/v1/safety/score",
    response_model=ScoreResponse,
    response_model_exclude_unset=True,
)
async def score(
    body: ScoreRequest, request: Request, service: TheService, lm: TheModel, access: TheAccess
) -> ScoreResponse:
    """Return the request risk, and the response risk if the last message is the assistant's.

    Nothing is generated. Flags are at the `flag` thresholds; that of the response is null where there is none.
    A key that may only see flags gets null for every number and may not ask for a trace (400); one that may
    see nothing gets a 403. Where the safety head fails there is no judgement, but a 500.
    """
    service.require_model(body.model)
    config = service.require_signal()
    is_full = access.expose_risk == "full"
    if access.expose_risk == "none":
        raise Forbidden("this caller may not see judgements")
    if body.trace and not is_full:
        raise invalid("trace", "trace is only for callers who may see exact risks", code="not_allowed")
    prompt = await encode(lm, body.messages, continue_final=body.messages[-1].role == "assistant")
    name = f"score-{uuid.uuid4().hex}"
    trace = await unless_gone(request, service.engine.score(name, prompt, cache_salt=body.cache_salt or ""))
    if trace.num_failures:
        raise HeadFailed(trace.num_failures, param="messages")
    risks = (trace.request_risk, trace.response_risk(config.patience))
    response = ScoreResponse(
        id=name,
        object="safety.score",
        model=service.settings.name,
        request_risk=risks[0] if is_full else None,
        response_risk=risks[1] if is_full else None,
        flagged=_flagged(risks, config),
        thresholds=_thresholds(config) if is_full else None,
    )
    return response.model_copy(update={"trace": _tokens(lm, prompt, trace)}) if body.trace else response


def _flagged(risks: tuple[float | None, float | None], config: SafetyConfig) -> Flagged:
    request, response = risks
    return Flagged(
        request=request is not None and request > config.request.flag,
        response=None if response is None else response > config.response.flag,
    )


def _thresholds(config: SafetyConfig) -> ScoreThresholds:
    def both(thresholds: Thresholds) -> RiskThresholds:
        return RiskThresholds(block=thresholds.block, flag=thresholds.flag)

    return ScoreThresholds(request=both(config.request), response=both(config.response), patience=config.patience)


def _tokens(lm: GuardedLM, prompt: EncodedPrompt, trace: Trace) -> list[ScoredToken]:
    """Return every token of the response with its risks."""
    text_of = token_texts(lm.tokenizer)
    return [
        ScoredToken(token_id=token_id, token=text_of(token_id), risk=found.risk, smoothed_risk=found.smoothed)
        for token_id, found in zip(prompt.prefill, trace.assessments, strict=True)
    ]
