"""Normalisation of redundant slashes in paths."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

SLASHES = re.compile("/{2,}")


class PlainPaths:
    """Treats `/v1/models/` and `//v1/models` as `/v1/models`.

    Must be inside the authentication middleware, which therefore sees paths as sent: an open path in any other spelling
    needs a key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")
        if path.endswith("/") or "//" in path:
            scope = {**scope, "path": SLASHES.sub("/", path).rstrip("/") or "/"}
        await self.app(scope, receive, send)
