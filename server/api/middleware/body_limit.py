"""Limits on the size of a request body, and on the amount of all bodies read at once."""

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
    """Refuses bodies that are too long: by their declared length, or while they are read.

    Long bodies are read in turns, one part of one body per cycle of the event loop, while flow control holds back the
    other connections: a cycle takes the same time for any number of bodies. Slow senders delay nobody, and a body with
    little read so far goes before one with much.

    Args:
        owner_of: function that identifies the owner of a request.
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
        # int() would accept signs, spaces and non-ASCII digits.
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
