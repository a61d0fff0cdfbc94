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
        self._keys = KnownKeys(keys)
        self._open = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open or self._keys.fit(Headers(scope=scope)):
            await self.app(scope, receive, send)
        else:
            error = UnauthorizedError("no valid API key: send one as 'Authorization: Bearer KEY'")
            await error_response(error)(scope, receive, send)


class KnownKeys:
    """Keys to compare clients' with. Only digests are kept and compared, so that no key's length takes time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def fit(self, headers: Headers) -> bool:
        """Whether a request carries one of the keys."""
        key = bearer_key(headers)
        digest = _digest(key or b"")
        # All are compared, whichever fits, so that the time taken tells nothing about the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return key is not None and any(matches)


def bearer_key(headers: Headers) -> bytes | None:
    """The key in `Authorization: Bearer KEY`, without white space around it."""
    # Headers are decoded as Latin-1, in which bytes of other characters look like white space.
    parts = headers.get("authorization", "").encode("latin-1").split(maxsplit=1)
    return parts[1].rstrip() if len(parts) == 2 and parts[0].lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
