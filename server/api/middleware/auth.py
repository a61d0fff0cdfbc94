"""API keys."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import UnauthorizedError, error_response


class ApiKeys:
    """Lets requests through that carry a known key. Every path needs one, except those that are named as open."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[str]) -> None:
        self.app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open or self._knows(Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            error = UnauthorizedError("no valid API key: send one as 'Authorization: Bearer KEY'")
            await error_response(error)(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))  # which is how headers are decoded
        # All are compared, whichever fits, so that the time taken tells nothing about the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
