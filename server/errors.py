"""Every error a client sees, in the OpenAI form, and the one place where its HTTP code is chosen.

ApiError            an answer that is an error
├── Unauthorized    401: no key, or a wrong one
├── Forbidden       403: the key may not do this
├── NotServed       404: a model by another name
├── NotJson         415: a body that is not declared as JSON
├── HeadFailed      500: no judgement, because the safety head gave no number
└── NotReady        503: loading, or shutting down
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from model.errors import ContextLengthError, InvalidRequest, TemplateError
from server.complaint import complaint, shortened
from server.engine.engine import EngineError, Overloaded
from server.protocol.shared import ErrorBody, ErrorDetail, printable

CLIENT_CLOSED_REQUEST = 499
"""Noted in logs and metrics when the client left; nobody reads the answer."""

RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
"""What the API's description says about errors, for every route."""

HEAD_FAILED = "head_failed"
"""Code of an error where a judgement would have been."""

NOT_READY_RETRY_S = 5
ENGINE_RETRY_S = 1

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_FIELD_CODES = {
    "missing": "missing_required_parameter",
    "unknown_parameter": "unknown_parameter",
    "unsupported_parameter": "unsupported_parameter",
    "invalid_unicode": "invalid_unicode",
}
"""What is wrong with a field, by pydantic's name of the error."""
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class ApiError(Exception):
    """An error with its status, its place in the request and its headers."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> ErrorBody:
        """Return the error in the OpenAI form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = printable(self.param) if self.param is not None else None
        return ErrorBody(error=ErrorDetail(message=printable(str(self)), type=kind, param=param, code=self.code))

    def response(self) -> JSONResponse:
        """Return the error as an HTTP response."""
        return JSONResponse(self.body().model_dump(), status_code=self.status, headers=self.headers)


class Unauthorized(ApiError):
    """The request carries no key, or one that is not known."""

    def __init__(self) -> None:
        message = "this server needs a valid API key, sent as `Authorization: Bearer <key>`"
        super().__init__(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


class Forbidden(ApiError):
    """The key is known, but may not do this."""

    def __init__(self, message: str) -> None:
        super().__init__(403, message, code="not_allowed")


class NotServed(ApiError):
    """The named model is not the one served here."""

    def __init__(self, name: str, known: Sequence[str], *, param: str) -> None:
        message = f"the model {name!r} is not served here; use {' or '.join(map(repr, known))}"
        super().__init__(404, message, code="model_not_found", param=param)


class NotJson(ApiError):
    """The body is not declared as JSON."""

    def __init__(self, media_type: str) -> None:
        sent = f", got {shortened(repr(media_type))}" if media_type else ""
        message = f"the body must be JSON{sent}; send the header `content-type: application/json`"
        super().__init__(415, message, code="unsupported_media_type")


class HeadFailed(ApiError):
    """The safety head gave no finite number, so there is no judgement."""

    def __init__(self, num_failures: int, *, param: str) -> None:
        message = f"the safety head failed on {num_failures} assessment(s) of {param}, so it is not judged"
        super().__init__(500, message, code=HEAD_FAILED, param=param)


class NotReady(ApiError):
    """The model is not loaded yet, or not served any more."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, code="not_ready", headers={"retry-after": str(NOT_READY_RETRY_S)})


def invalid(param: str, message: str, *, code: str = "invalid_value") -> ApiError:
    """Return a 400 about one field."""
    return ApiError(400, message, code=code, param=param)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client may know about `error`; internals stay inside."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return invalid(error.param, str(error), code="context_length_exceeded")
        case InvalidRequest():
            return invalid(error.param, str(error))
        case TemplateError():
            return invalid("messages", str(error))
        case Overloaded():
            after = error.retry_after_s
            headers = {"retry-after": str(after), "retry-after-ms": str(after * 1000)}
            return ApiError(429, f"the server is busy: {error}", code="overloaded", headers=headers)
        case EngineError():
            return ApiError(503, str(error), code="engine_error", headers={"retry-after": str(ENGINE_RETRY_S)})
        case HTTPException(status_code=400, __cause__=ValueError() | RecursionError() as cause):
            return _unreadable(cause)
        case HTTPException():
            code = _CODES.get(error.status_code, "invalid_request")
            return ApiError(error.status_code, str(error.detail), code=code, headers=error.headers)
        case RequestValidationError():
            return _from_validation(error.errors()[0])
    return ApiError(500, "the server failed on this request", code="internal_error")


def install(app: FastAPI) -> None:
    """Answer every known exception in the OpenAI form."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = HTTPException(
                error.status_code, f"no {request.method} {printable(request.url.path)} here", error.headers
            )
        return as_api_error(error).response()

    async def nobody_reads(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (ApiError, InvalidRequest, TemplateError, EngineError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(ClientDisconnect, nobody_reads)


def _from_validation(found: Mapping[str, Any]) -> ApiError:
    """Return the 400 for pydantic's description of one invalid field."""
    kind, context = str(found["type"]), found.get("ctx", {})
    if kind == "json_invalid":
        where = found["loc"][-1]
        return ApiError(
            400, f"the body is not valid JSON: {context['error']} at character {where}", code="invalid_json"
        )
    field = field_path([*found["loc"][1:], *([context["field"]] if "field" in context else [])])
    if not field:
        return ApiError(400, "the body must be a JSON object", code="invalid_body")
    return invalid(field, f"{field} {complaint(found)}", code=_FIELD_CODES.get(kind, "invalid_value"))


def _unreadable(cause: ValueError | RecursionError) -> ApiError:
    """Return the 400 for a body on which the JSON parser itself gave up."""
    match cause:
        case UnicodeDecodeError():
            why = f"byte {cause.start} is not {cause.encoding.upper()} ({cause.reason})"
            return ApiError(400, f"the body is not valid text: {why}", code="invalid_unicode")
        case RecursionError():
            return ApiError(400, "the body is nested too deeply to be read", code="invalid_json")
    return ApiError(400, "the body holds a number of too many digits to be read", code="invalid_json")


def field_path(location: Sequence[int | str]) -> str:
    """Return a field's path as a client writes it, such as `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("("):  # the tag of a union
            path += f".{part}" if path else part
    return path
