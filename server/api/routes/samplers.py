"""`/v1/samplers`"""

from functools import lru_cache

from fastapi import FastAPI, Response

from samplers import BrokenPlugin, describe, list_unavailable, named_samplers
from samplers.learned.policy import Policy
from server.api.errors import NotFoundError
from server.api.schemas.bodies import show
from server.api.schemas.openapi import ERRORS, LOOKUP_ERRORS
from server.api.schemas.responses import SamplerCard, SamplerList, json_response
from server.api.serving import Serving


def add_routes(app: FastAPI, serving: Serving) -> None:
    @lru_cache(maxsize=2)
    def cards(
        there: tuple[tuple[str, int], ...], broken: tuple[BrokenPlugin, ...], policies: bool
    ) -> tuple[dict[str, SamplerCard], bytes]:
        """Each sampler's card, and the JSON of all. Cached: schemas are slow to make and depend on these arguments."""
        reasons = {} if policies else {Policy.name: "no policy is loaded"}
        found = {name: _card(name, serving.model_names.why_not(name) or reasons.get(name)) for name, _ in there}
        found |= {plugin.name: _broken_card(plugin) for plugin in broken}
        return found, SamplerList(data=list(found.values())).model_dump_json().encode()

    def current() -> tuple[dict[str, SamplerCard], bytes]:
        # By name and identity: a plugin's sampler may not implement equality well.
        there = tuple((name, id(sampler)) for name, sampler in named_samplers().items())
        return cards(there, tuple(list_unavailable()), bool(serving.model_names.policies.list()))

    @app.get("/v1/samplers", response_model=SamplerList, responses=ERRORS, tags=["catalogue"])
    async def samplers() -> Response:
        """List the samplers with the schema of their parameters."""
        return Response(current()[1], media_type="application/json")

    @app.get("/v1/samplers/{sampler:path}", response_model=SamplerCard, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def one_sampler(sampler: str) -> Response:
        """Look up one sampler."""
        found = current()[0]
        if sampler not in found:
            message = f"there is no sampler {show(sampler)}; there are {', '.join(found)}"
            raise NotFoundError("sampler", message, "sampler_not_found")
        return json_response(found[sampler])


def _card(name: str, reason: str | None) -> SamplerCard:
    said = describe(name)
    return SamplerCard(
        id=name,
        description=said.summary,
        paper=said.paper,
        available=reason is None,
        reason=reason,
        parameters=said.schema,
    )


def _broken_card(plugin: BrokenPlugin) -> SamplerCard:
    reason = f"the sampler of {plugin.distribution} could not be loaded: {plugin.reason}"
    return SamplerCard(id=plugin.name, description="", paper="", available=False, reason=reason, parameters={})
