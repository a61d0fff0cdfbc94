"""How long a request's body may be, and how much of all bodies is read at once."""

import asyncio
import sys
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BadHeaderError, BodyTooLargeError, error_response
from server.api.fair_line import FairLine
from server.engine import Owner, QueueFullError

SHORT = 64 * 1024
"""Bytes of a body that are read without waiting for other bodies."""


class BodyLimit:
    """Refuses a body that says it is too long at once, and one that turns out to be while it is read.

    Long bodies are read by turns, one part of one of them in a round of the event loop: the connections' flow control
    keeps back the rest. However many come, a round takes no longer. Whoever is slow to send keeps nobody waiting, and
    who has sent little so far waits less than who has sent much.

    Args:
        owner_of: whose a request is.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, owner_of: Callable[[HTTPConnection], Owner]) -> None:
        self.app = app
        self._max = max_bytes
        self._owner_of = owner_of
        self._line = FairLine(1, sys.maxsize, QueueFullError)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        # int() would take signs, spaces and other digits than 0 to 9.
        if not (length.isascii() and length.isdigit()):
            error = BadHeaderError(f"content-length is {length[:40]!r}, which is not a number of bytes")
            await error_response(error)(scope, receive, send)
        elif len(length) > 18 or int(length) > self._max:
            await error_response(self._too_large())(scope, receive, send)
        else:
            await self.app(scope, self._counting(scope, receive), send)

    def _counting(self, scope: Scope, receive: Receive) -> Receive:
        received, whole = 0, False

        async def receive_counted() -> Message:
            nonlocal received, whole
            if received > SHORT and not whole:
                turn = await self._line.enter(self._owner_of(HTTPConnection(scope)), received)
                try:
                    await asyncio.sleep(0)
                finally:
                    self._line.leave(turn)
            message = await receive()
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._max:
                raise self._too_large()
            return message

        return receive_counted

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request's body is longer than the limit of {self._max} bytes (--max-body-bytes)")
