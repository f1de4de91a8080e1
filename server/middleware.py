"""The outer layers, in pure ASGI: they see every chunk of a stream and every disconnect."""

import structlog
from fastapi.routing import iter_route_contexts
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.errors import origin
from server.errors import CLIENT_CLOSED_REQUEST, ApiError, as_api_error
from server.exchange import Exchange, request_id_for
from server.metrics import Metrics

logger = structlog.get_logger(__name__)

QUIET_ENDPOINTS = ("/livez", "/readyz", "/metrics")
"""Asked every few seconds by machines; logged at debug level only, unless they are refused."""
REFUSED = (401, 403)

UNMATCHED = "unmatched"
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
"""Methods that the log names. A client can send any word as one."""


class Observe:
    """The outermost layer: request id, access log, HTTP metrics, and an answer to every surprise.

    The log holds ids, counts and timings; never a path as sent, and never text.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an ASGI exchange on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(request_id_for(Headers(scope=scope).get("x-request-id")))
        scope["ballast"] = exchange
        status, is_complete = 0, False

        async def send_observed(message: Message) -> None:
            nonlocal status, is_complete
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = exchange.request_id
            elif not message.get("more_body", False):
                is_complete = True
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception as error:
            logger.error("unexpected error", request_id=exchange.request_id, error=origin(error))
            if not status:
                await as_api_error(error).response()(scope, receive, send_observed)
        finally:
            self._record(scope, exchange, status if is_complete else CLIENT_CLOSED_REQUEST)

    def _record(self, scope: Scope, exchange: Exchange, status: int) -> None:
        endpoint = _endpoint(scope)
        self._metrics.observe_request(endpoint, status, exchange.finish_reason, exchange.elapsed_s)
        is_quiet = endpoint in QUIET_ENDPOINTS and status not in REFUSED
        log = logger.debug if is_quiet else logger.info
        log(
            "request",
            request_id=exchange.request_id,
            key=exchange.access.name if exchange.access else "",
            method=scope["method"] if scope["method"] in METHODS else "",
            endpoint=endpoint,
            status=status,
            finish_reason=exchange.finish_reason or None,
            prompt_tokens=exchange.prompt_tokens,
            completion_tokens=exchange.completion_tokens,
            seconds=round(exchange.elapsed_s, 4),
        )


def _endpoint(scope: Scope) -> str:
    """Return the template of the route for a path, by another method if not by this one; never the path itself.

    Finds it for a request too that a layer has answered before the router saw it.
    """
    found = UNMATCHED
    for route in iter_route_contexts(scope["app"].routes):
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return str(route.path)
        if match is Match.PARTIAL and found == UNMATCHED:
            found = str(route.path)
    return found


class LimitBody:
    """Refuses a body over the limit with 413, before it is read where its length is announced."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an ASGI exchange on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced) > self._max_bytes:
            error = ApiError(413, self._message, code="body_too_large")
            await error.response()(scope, receive, send)
            return
        num_read = 0

        async def receive_counted() -> Message:
            nonlocal num_read
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self._max_bytes:
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, receive_counted, send)

    @property
    def _message(self) -> str:
        return f"the body may be {self._max_bytes} bytes long at most"
