"""`/v1/samplers`"""

from fastapi import FastAPI, Response

from samplers import Sampler, list_samplers
from server.api.errors import NotFoundError
from server.api.openapi import ERRORS, LOOKUP_ERRORS
from server.api.responses import SamplerCard, SamplerList, json_response


def add_routes(app: FastAPI) -> None:
    cards = {sampler.name: _card(sampler) for sampler in list_samplers()}

    @app.get("/v1/samplers", response_model=SamplerList, responses=ERRORS, tags=["catalogue"])
    async def samplers() -> Response:
        """List the samplers with the schema of their parameters."""
        return json_response(SamplerList(data=list(cards.values())))

    @app.get("/v1/samplers/{sampler:path}", response_model=SamplerCard, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def one_sampler(sampler: str) -> Response:
        """Look up one sampler."""
        if sampler not in cards:
            message = f"there is no sampler {sampler[:200]!r}; there are {', '.join(cards)}"
            raise NotFoundError("sampler", message, "sampler_not_found")
        return json_response(cards[sampler])


def _card(sampler: Sampler) -> SamplerCard:
    return SamplerCard(
        id=sampler.name,
        description=sampler.summary(),
        paper=sampler.paper,
        available=True,
        parameters=sampler.schema(),
    )
