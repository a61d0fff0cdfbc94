"""Errors in OpenAI's format: one table from exception to status, type and code."""

import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from samplers import SamplerError
from server.engine import Budget, FinishReason, KeyLimitError, NotServingError, QueueFullError, RequestError

MAX_PARAM = 60
"""Characters of a field's name, which a client may have chosen."""
MAX_MESSAGE = 1000
"""Characters of a message: a last resort, since messages shorten the values they quote."""
MAX_PATH = 100
"""Characters of a path quoted in a message."""
RETRY_SECONDS = 1
"""Seconds in `Retry-After`: a full queue moves on with every generation that ends."""


class ErrorDetail(BaseModel):
    """Cause of an error. `param` names the field to change, such as `sampler_params.threshold`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """The body of every answer that is no success, and of the last event of a stream that failed."""

    error: ErrorDetail


class NotFoundError(RequestError):
    """The thing that a field names is not there."""


class BodyTooLargeError(Exception):
    """The request's body is longer than the server reads."""


class BadHeaderError(Exception):
    """A header that makes no sense."""


class SlowRequestError(Exception):
    """A client took too long to send a request that it had begun."""


class UrlTooLongError(Exception):
    """The request's line is longer than the server reads."""


class HeadersTooLargeError(Exception):
    """The request's headers are more than the server reads."""


class TooManyConnectionsError(Exception):
    """The server has as many connections as it takes."""


class TooManyBodiesError(Exception):
    """Long bodies are being sent on more connections than the server reads them from at once."""


class UnsupportedEncodingError(Exception):
    """A body that is compressed."""


class UnauthorizedError(Exception):
    """No API key, or one that is not known."""


class ForbiddenError(Exception):
    """The key is not the one that this needs."""


class GenerationFailedError(Exception):
    """The engine could not finish a generation."""


class GenerationTimeoutError(GenerationFailedError):
    """A request's time was up before its generations were done."""


class GenerationEndedError(GenerationFailedError):
    """The server stopped before a generation was done."""


INVALID, SERVER = "invalid_request_error", "server_error"

# The first matching row counts. Code None: the exception carries its own code.
ERRORS: list[tuple[type[Exception], int, str, str | None]] = [
    (NotFoundError, 404, INVALID, None),
    (RequestError, 400, INVALID, None),
    (BadHeaderError, 400, INVALID, "invalid_header"),
    (UnauthorizedError, 401, INVALID, "invalid_api_key"),
    (ForbiddenError, 403, "permission_error", "forbidden"),
    (SlowRequestError, 408, INVALID, "request_timeout"),
    (BodyTooLargeError, 413, INVALID, "request_too_large"),
    (UrlTooLongError, 414, INVALID, "url_too_long"),
    (UnsupportedEncodingError, 415, INVALID, "unsupported_encoding"),
    (HeadersTooLargeError, 431, INVALID, "headers_too_large"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (KeyLimitError, 429, "rate_limit_error", None),
    (ClientDisconnect, 499, INVALID, "client_disconnected"),
    (TooManyConnectionsError, 503, "service_unavailable_error", "too_many_connections"),
    (TooManyBodiesError, 503, "service_unavailable_error", "too_many_bodies"),
    (NotServingError, 503, "service_unavailable_error", "not_serving"),
    (GenerationEndedError, 503, "service_unavailable_error", "not_serving"),
    (GenerationTimeoutError, 504, "timeout_error", "timeout"),
    (GenerationFailedError, 500, SERVER, "generation_failed"),
    (SamplerError, 500, SERVER, "generation_failed"),
    (Exception, 500, SERVER, "internal_error"),
]
HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def describe(error: Exception) -> tuple[int, ErrorDetail]:
    """Status and body of an exception. Internal errors reveal no details.

    The body is short whatever the exception holds: values sent by a client are quoted in part only.
    """
    status, detail = _describe(error)
    update: dict[str, Any] = {"message": shortened(detail.message, MAX_MESSAGE)}
    if detail.param is not None:
        update["param"] = shortened(detail.param, MAX_PARAM)
    return status, detail.model_copy(update=update)


def shortened(text: str, length: int) -> str:
    """Text cut to a length, marked by three dots if it was longer."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _describe(error: Exception) -> tuple[int, ErrorDetail]:
    if isinstance(error, HTTPException):
        status, kind = error.status_code, INVALID if error.status_code < 500 else SERVER
        return status, ErrorDetail(message=error.detail, type=kind, code=HTTP_CODES.get(status, "http_error"))
    kind, status, code = next((kind, status, code) for cls, status, kind, code in ERRORS if isinstance(error, cls))
    if isinstance(error, KeyLimitError):
        code = f"key_{error.limit}"
    message = "the server failed; its log says why" if code == "internal_error" else str(error)
    if isinstance(error, RequestError):
        return status, ErrorDetail(message=message, type=kind, param=error.field, code=error.code)
    return status, ErrorDetail(message=message, type=kind, code=code)


def error_response(error: Exception) -> Response:
    """Complete response for an exception."""
    status, detail = describe(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["retry-after"] = str(RETRY_SECONDS)
    if isinstance(error, KeyLimitError):
        headers |= _key_limit_headers(error)
    if status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    if status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
        headers["accept-encoding"] = "identity"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        headers["connection"] = "close"  # do not read the rest of the body
    return Response(ErrorResponse(error=detail).model_dump_json(), status, headers, media_type="application/json")


def _key_limit_headers(error: KeyLimitError) -> dict[str, str]:
    """Headers with the retry time and the remaining budget. `x-should-retry` keeps OpenAI's clients from retrying."""
    if math.isinf(error.wait):
        return {"retry-after": "60", "x-should-retry": "false"} | budget_headers(error.budget)
    return {"retry-after": str(max(RETRY_SECONDS, math.ceil(error.wait)))} | budget_headers(error.budget)


def budget_headers(budget: Budget | None) -> dict[str, str]:
    """Remaining tokens per minute of a key, in OpenAI's headers; empty without a limit."""
    if budget is None:
        return {}
    return {
        "x-ratelimit-limit-tokens": str(budget.limit),
        "x-ratelimit-remaining-tokens": str(budget.remaining),
        "x-ratelimit-reset-tokens": f"{budget.reset:.3f}s",
    }


def failure(reason: FinishReason, message: str) -> GenerationFailedError:
    """Exception for a generation that ended before it was complete."""
    if reason is FinishReason.TIMEOUT:
        return GenerationTimeoutError(message)
    if reason is FinishReason.ABORT:
        return GenerationEndedError(message or "the generation was ended because the server is stopping")
    return GenerationFailedError(message)


def add_error_handlers(app: FastAPI) -> None:
    """Handle all exceptions of the table, and the framework's own, with our error format."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.detail == HTTPStatus(error.status_code).phrase:
            what = f"{error.detail}: {request.method} {request.scope['path'][:MAX_PATH]}"
            headers = {name.lower(): value for name, value in (error.headers or {}).items()}
            if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                headers["allow"] = ", ".join(_allowed(app, request))
            error = HTTPException(error.status_code, what, headers)
        return error_response(error)

    app.add_exception_handler(HTTPException, answer)
    for cls, *_ in ERRORS:
        if cls is not Exception:  # handled by the outermost middleware, which knows the request's id
            app.add_exception_handler(cls, answer)


def _allowed(app: FastAPI, request: Request) -> list[str]:
    """Methods allowed on a request's path over all routes: the framework's first match knows only its own."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    fitting = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    methods = {method for route in fitting for method in route.methods or ()}
    return sorted(methods | ({"HEAD"} if "GET" in methods else set()))
