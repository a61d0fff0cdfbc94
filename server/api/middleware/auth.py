"""API key authentication."""

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import UnauthorizedError, error_response


class ApiKeys:
    """Admits requests with a valid key. All paths need one, except the named open ones."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[str]) -> None:
        self.app = app
        self._keys = KnownKeys(keys)
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open or self._keys.fit(Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            error = UnauthorizedError("no valid API key: send one as 'Authorization: Bearer KEY'")
            await error_response(error)(scope, receive, send)


class KnownKeys:
    """Set of valid keys. Only digests are stored and compared, so that timing does not depend on a key's length."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def fit(self, headers: Headers) -> bool:
        """True if a request carries one of the keys."""
        key = bearer_key(headers)
        digest = _digest(key or b"")
        # Compare all keys, even after a match, so that timing reveals nothing about them.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return key is not None and any(matches)


def bearer_key(headers: Headers) -> bytes | None:
    """The key in `Authorization: Bearer KEY`, without white space around it."""
    # Headers are decoded as Latin-1, in which bytes of other characters may count as white space.
    parts = headers.get("authorization", "").encode("latin-1").split(maxsplit=1)
    return parts[1].rstrip() if len(parts) == 2 and parts[0].lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
