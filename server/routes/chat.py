"""`POST /v1/chat/completions`: validate, encode, submit, and answer whole or as a stream."""

import time
import uuid
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from server.admission import admit
from server.chat_answer import ChatAnswer
from server.choices import Choices
from server.departure import unless_gone
from server.errors import as_api_error
from server.exchange import Exchange
from server.metrics import ChoiceMeter
from server.protocol.chat import ChatRequest
from server.protocol.completion import ChatCompletion
from server.service import JSON_BODY, TheAccess, TheExchange, TheModel, TheService
from server.sse import DONE, ChoiceStream, event

router = APIRouter(tags=["chat"], dependencies=[JSON_BODY])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={
        200: {
            "description": "The whole answer, or with `stream: true` its chunks, ended by `data: [DONE]`",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def create(
    body: ChatRequest, request: Request, service: TheService, lm: TheModel, access: TheAccess, exchange: TheExchange
) -> Response:
    """Answer a conversation; every token is scored before it leaves.

    A policy decision is never an HTTP error: the answer ends with `finish_reason: "content_filter"` and
    carries a refusal. Each choice has a `safety` object, and the answer a `moderation` object if the
    request had one. How much they show depends on the key's `expose_risk`: at `full` the exact risks; at
    `flag` risks are null, there is no trace, and `category_scores` are 0 or 1 as flagged; at `none` also
    `moderation` has no results. The `action` always shows.
    """
    requests = await admit(service, lm, access, body)
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    answer = ChatAnswer(
        completion_id=completion_id,
        model=service.settings.name,
        created=int(time.time()),
        body=body,
        modes=(requests[0].input, requests[0].output),
        lm=lm,
        exposure=access.expose_risk,
        refusal_in_content=service.settings.refusal_in_content,
        num_choices=len(requests),
    )
    meters = [ChoiceMeter(service.metrics, one, exchange) for one in requests]
    choices = Choices(service.engine, completion_id, requests, meters)
    if body.stream:
        return ChoiceStream(_stream(choices, answer, exchange), choices, drain_s=service.settings.drain_s)
    try:
        await unless_gone(request, _collect(choices, answer))
    except Exception as error:
        exchange.finish_reason = "aborted" if isinstance(error, ClientDisconnect) else "error"
        raise
    finally:
        choices.close()
    exchange.finish_reason = answer.finish_reason
    return Response(answer.whole().model_dump_json(exclude_unset=True), media_type="application/json")


async def _collect(choices: Choices, answer: ChatAnswer) -> None:
    async for index, item in choices.events():
        answer.add(index, item)


async def _stream(choices: Choices, answer: ChatAnswer, exchange: Exchange) -> AsyncIterator[bytes]:
    """Yield the events of a stream; an error becomes its last event but one."""
    exchange.finish_reason = "aborted"  # until it is known better
    try:
        for chunk in answer.opening():
            yield event(chunk)
        async for index, item in choices.events():
            made = answer.add(index, item)
            if made is not None:
                yield event(made)
        exchange.finish_reason = answer.finish_reason
        for chunk in answer.closing():
            yield event(chunk)
    except Exception as error:
        exchange.finish_reason = "error"
        yield event(as_api_error(error).body())
    yield DONE
