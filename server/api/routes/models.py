"""`/v1/models`"""

from fastapi import FastAPI, Response

from server.api.errors import NotFoundError
from server.api.schemas.bodies import show
from server.api.schemas.openapi import ERRORS, LOOKUP_ERRORS
from server.api.schemas.responses import Model, ModelList, json_response
from server.api.serving import Serving


def add_routes(app: FastAPI, serving: Serving) -> None:
    names = serving.model_names

    def entry(name: str) -> Model:
        return Model(
            id=name,
            created=serving.created,
            root=names.name,
            parent=None if name == names.name else names.name,
            max_model_len=serving.engine.info.max_length,
        )

    @app.get("/v1/models", response_model=ModelList, responses=ERRORS, tags=["catalogue"])
    async def list_models() -> Response:
        """List the names that requests can use: the served model, and with each sampler and each policy."""
        return json_response(ModelList(data=[entry(name) for name in names.names()]))

    @app.get("/v1/models/{model:path}", response_model=Model, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def get_model(model: str) -> Response:
        """Look up one name."""
        if model not in names.names():
            message = f"model {show(model)} is not served here: use {names.name!r}"
            raise NotFoundError("model", message, "model_not_found")
        return json_response(entry(model))
