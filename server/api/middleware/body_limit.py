"""How long a request's body may be."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import BadHeaderError, BodyTooLargeError, error_response


class BodyLimit:
    """Refuses a body that says it is too long at once, and one that turns out to be while it is read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max = max_bytes

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
            await self.app(scope, self._counting(receive), send)

    def _counting(self, receive: Receive) -> Receive:
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max:
                raise self._too_large()
            return message

        return receive_counted

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the request's body is longer than the limit of {self._max} bytes (--max-body-bytes)")
