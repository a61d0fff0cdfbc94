"""Routes for operators and monitoring: `/health`, `/ready`, `/metrics`, `/version`."""

import asyncio

from fastapi import FastAPI, Request, Response
from prometheus_client.exposition import choose_encoder

from server.api.schemas.openapi import ERRORS, UNAVAILABLE
from server.api.schemas.responses import Health, Version, json_response
from server.api.serving import Serving
from server.engine import NotServingError
from server.runtime.version import VERSION

OPEN = frozenset({"/health", "/ready"})
"""Paths that never need a key."""
METRICS = "/metrics"


def add_routes(app: FastAPI, serving: Serving) -> None:
    engine = serving.engine

    @app.get("/health", response_model=Health, responses=UNAVAILABLE, tags=["operations"])
    async def health() -> Response:
        """Health of the engine: 503 once it has died."""
        if not engine.alive:
            raise NotServingError("the engine is not running")
        return json_response(Health(status="ok"))

    @app.get("/ready", response_model=Health, responses=UNAVAILABLE, tags=["operations"])
    async def ready() -> Response:
        """Readiness for new requests: 503 while none are taken."""
        engine.check_accepting()
        return json_response(Health(status="ready"))

    @app.get(METRICS, response_class=Response, responses=ERRORS, tags=["operations"])
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus."""
        serving.metrics.tasks(len(asyncio.all_tasks()))
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(serving.metrics.registry), media_type=content_type)

    @app.get("/version", response_model=Version, responses=ERRORS, tags=["operations"])
    async def show_version() -> Response:
        """The server's version."""
        return json_response(Version(version=VERSION))
