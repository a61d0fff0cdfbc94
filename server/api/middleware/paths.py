"""Paths with more slashes than they need."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

SLASHES = re.compile("/{2,}")


class PlainPaths:
    """Reads `/v1/models/` and `//v1/models` as `/v1/models`.

    Belongs inside of what checks keys, which therefore knows paths only as they came: a path that is open as it stands
    here, but was written differently, is not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")
        if path.endswith("/") or "//" in path:
            scope = {**scope, "path": SLASHES.sub("/", path).rstrip("/") or "/"}
        await self.app(scope, receive, send)
