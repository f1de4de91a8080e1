"""`POST /v1/moderations`: the request risk of texts."""

import uuid

from fastapi import APIRouter, Request

from model.errors import InvalidRequest, TemplateError
from model.guarded_lm import GuardedLM
from server.admission import encode
from server.departure import unless_gone
from server.errors import Forbidden, HeadFailed, as_api_error, invalid
from server.protocol.chat import ChatMessage
from server.protocol.moderation import ModerationRequest, ModerationResponse
from server.results import moderation
from server.service import JSON_BODY, Service, TheAccess, TheModel, TheService

router = APIRouter(tags=["safety"], dependencies=[JSON_BODY])


@router.post("/v1/moderations")
async def create(
    body: ModerationRequest, request: Request, service: TheService, lm: TheModel, access: TheAccess
) -> ModerationResponse:
    """Judge each text as the request of a user.

    The safety signal has one score, the request risk, and it stands under the category `unsafe`. In the 13
    categories of the OpenAI API, `false` and 0 mean *not judged*: they do not mean that a text is safe in
    that respect. A list of parts is one text. A key that may only see flags gets the scores 0 and 1; one
    that may see nothing gets a 403. A text on which the safety head fails is a 500.
    """
    if body.model is not None:
        service.require_model(body.model, aliases=service.settings.moderation_aliases)
    config = service.require_signal()
    if access.expose_risk == "none":
        raise Forbidden("this caller may not see judgements")
    name = f"modr-{uuid.uuid4().hex}"
    risks = await unless_gone(request, _risks(service, lm, name, body.texts, body.cache_salt or ""))
    results = [moderation(risk, config.request.flag, access.expose_risk) for risk in risks]
    return ModerationResponse(id=name, model=service.settings.name, results=results)


async def _risks(service: Service, lm: GuardedLM, name: str, texts: list[str], cache_salt: str) -> list[float]:
    """Return the request risk of each text, one after the other so that one call takes one turn."""
    risks = []
    for index, text in enumerate(texts):
        field = f"input[{index}]" if len(texts) > 1 else "input"
        try:
            prompt = await encode(lm, [ChatMessage(role="user", content=text)], continue_final=False)
            trace = await service.engine.score(f"{name}-{index}", prompt, cache_salt=cache_salt)
        except TemplateError as error:
            raise invalid(field, str(error)) from error
        except InvalidRequest as error:
            param = field if error.param == "messages" else error.param
            raise invalid(param, str(error), code=as_api_error(error).code or "invalid_value") from error
        if trace.num_failures:
            raise HeadFailed(trace.num_failures, param=field)
        assert trace.request_risk is not None
        risks.append(trace.request_risk)
    return risks
