"""OpenAPI description of routes that parse bodies and write responses themselves."""

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route, request_response

from server.api.errors import ErrorResponse
from server.api.schemas.fields import bodies

Responses = dict[int | str, dict[str, Any]]
SCHEMAS = "#/components/schemas/{model}"


def _errors(*statuses: int) -> Responses:
    what = {
        400: "A field is wrong; `param` names it",
        401: "No valid API key",
        403: "Not the admin key",
        404: "There is no such thing",
        413: "The body is too long",
        415: "The body is compressed",
        429: "The queue is full, or too much waits to be read; try again after `Retry-After` seconds",
        500: "The server failed",
        503: "The server is stopping, or its engine is not running",
        504: "The request's time was up",
    }
    return {status: {"model": ErrorResponse, "description": what[status]} for status in statuses}


ERRORS = _errors(401)
LOOKUP_ERRORS = _errors(401, 404)
BODY_ERRORS = _errors(400, 401, 404, 413, 415, 429, 503)
ADMIN_ERRORS = _errors(400, 401, 403, 404, 413, 415, 429, 503)
GENERATION_ERRORS = _errors(400, 401, 404, 413, 415, 429, 500, 503, 504)
UNAVAILABLE = _errors(503)


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Request body of a route, for its `openapi_extra`."""
    schema = {"$ref": SCHEMAS.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def streamed(chunk: type[BaseModel]) -> Responses:
    """Successful responses of a route that can stream."""
    what = f"Whole, or as events whose data is a `{chunk.__name__}` each, then `[DONE]`"
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {200: {"description": what, "content": {"text/event-stream": {"schema": event}}}}


def complete_openapi(app: FastAPI, open_paths: frozenset[str] | None) -> None:
    """Add the schemas of request bodies to the app's OpenAPI document, and remove responses that are never sent.

    Args:
        open_paths: paths that need no key; None if no path needs one.
    """
    _, schema = models_json_schema([(model, "validation") for model in bodies()], ref_template=SCHEMAS)
    document = app.openapi()
    schemas = document["components"]["schemas"]
    schemas.update(schema["$defs"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # path parameters are strings: nothing to validate
            if open_paths is None or path in open_paths:
                operation["responses"].pop("401", None)
            if open_paths is not None and path in open_paths:
                operation["security"] = []
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if open_paths is not None:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    _serve_once_made(app, document)


def _serve_once_made(app: FastAPI, document: dict[str, Any]) -> None:
    """Serve the finished document instead of serialising it for each request."""
    content = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

    async def openapi(request: Request) -> Response:
        return Response(content, media_type="application/json")

    for route in app.routes:
        if isinstance(route, Route) and route.path == app.openapi_url:
            route.app = request_response(openapi)
