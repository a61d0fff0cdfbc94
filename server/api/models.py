"""`/v1/models`"""

from fastapi import FastAPI, Response

from server.api.bodies import show
from server.api.errors import NotFoundError
from server.api.openapi import ERRORS, LOOKUP_ERRORS
from server.api.responses import Model, ModelList, json_response
from server.api.serving import Serving


def add_routes(app: FastAPI, serving: Serving) -> None:
    catalogue = serving.catalogue

    def entry(name: str) -> Model:
        return Model(
            id=name,
            created=serving.created,
            root=catalogue.name,
            parent=None if name == catalogue.name else catalogue.name,
            max_model_len=serving.engine.info.max_length,
        )

    @app.get("/v1/models", response_model=ModelList, responses=ERRORS, tags=["catalogue"])
    async def list_models() -> Response:
        """List the names that requests can use: the served model, and with each sampler and each policy."""
        return json_response(ModelList(data=[entry(name) for name in catalogue.names()]))

    @app.get("/v1/models/{model:path}", response_model=Model, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def get_model(model: str) -> Response:
        """Look up one name."""
        if model not in catalogue.names():
            message = f"model {show(model)} is not served here: use {catalogue.name!r}"
            raise NotFoundError("model", message, "model_not_found")
        return json_response(entry(model))
