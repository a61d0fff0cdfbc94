"""`/v1/models`"""

from fastapi import FastAPI, Response

from server.api.errors import NotFoundError
from server.api.openapi import ERRORS, LOOKUP_ERRORS
from server.api.responses import Model, ModelList, json_response
from server.api.serving import Serving


def add_routes(app: FastAPI, serving: Serving) -> None:
    base = serving.catalogue.name
    models = {
        name: Model(
            id=name,
            created=serving.created,
            root=base,
            parent=None if sampler is None else base,
            max_model_len=serving.engine.info.max_length,
        )
        for name, sampler in serving.catalogue.names.items()
    }

    @app.get("/v1/models", response_model=ModelList, responses=ERRORS, tags=["catalogue"])
    async def list_models() -> Response:
        """List the names that requests can use: the served model, and with each sampler."""
        return json_response(ModelList(data=list(models.values())))

    @app.get("/v1/models/{model:path}", response_model=Model, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def get_model(model: str) -> Response:
        """Look up one name."""
        if model not in models:
            raise NotFoundError("model", f"model {model[:200]!r} is not served here: use {base!r}", "model_not_found")
        return json_response(models[model])
