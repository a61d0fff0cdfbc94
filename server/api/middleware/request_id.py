"""Request ids, a log line for each request, and the response to unhandled errors."""

import asyncio
import re
import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from samplers.loop.guard import is_interrupt
from server.api.errors import error_response

log = structlog.get_logger(__name__)

HEADER = "x-request-id"
SHOWN_PATH = 200
"""Characters of a path quoted in the log."""
VALID_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


class RequestId:
    """Outermost middleware: sets the request id, the client's if it is valid, else a new one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        name = given if VALID_ID.fullmatch(given) else uuid.uuid4().hex
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        began = time.monotonic()
        with structlog.contextvars.bound_contextvars(request_id=name):
            try:
                await self.app(scope, receive, send_named)
            except BaseException as error:
                if isinstance(error, asyncio.CancelledError | GeneratorExit) or is_interrupt(error):
                    raise
                # An exit or panic within a request ends that request only.
                log.exception("request failed")
                if not status:
                    plain = error if isinstance(error, Exception) else RuntimeError("a request ended by an exit")
                    await error_response(plain)(scope, receive, send_named)
            seconds = round(time.monotonic() - began, 4)
            log.info("request", method=scope["method"], path=scope["path"][:SHOWN_PATH], status=status, seconds=seconds)
