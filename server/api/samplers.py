"""`/v1/samplers`"""

from fastapi import FastAPI, Response

from samplers import BrokenPlugin, Sampler, describe, list_samplers, list_unavailable
from samplers.guard import why_not
from samplers.policy import Policy
from server.api.errors import NotFoundError
from server.api.openapi import ERRORS, LOOKUP_ERRORS
from server.api.responses import SamplerCard, SamplerList, json_response
from server.api.serving import Serving


def add_routes(app: FastAPI, serving: Serving) -> None:
    def cards() -> dict[str, SamplerCard]:
        reasons = {} if serving.engine.policies.list() else {Policy.name: "no policy is loaded"}
        scheme = serving.engine.info.scheme
        found = {
            sampler.name: _card(sampler, why_not(sampler, scheme) or reasons.get(sampler.name))
            for sampler in list_samplers()
        }
        return found | {plugin.name: _broken_card(plugin) for plugin in list_unavailable()}

    @app.get("/v1/samplers", response_model=SamplerList, responses=ERRORS, tags=["catalogue"])
    async def samplers() -> Response:
        """List the samplers with the schema of their parameters."""
        return json_response(SamplerList(data=list(cards().values())))

    @app.get("/v1/samplers/{sampler:path}", response_model=SamplerCard, responses=LOOKUP_ERRORS, tags=["catalogue"])
    async def one_sampler(sampler: str) -> Response:
        """Look up one sampler."""
        found = cards()
        if sampler not in found:
            message = f"there is no sampler {sampler[:200]!r}; there are {', '.join(found)}"
            raise NotFoundError("sampler", message, "sampler_not_found")
        return json_response(found[sampler])


def _card(sampler: Sampler, reason: str | None) -> SamplerCard:
    said = describe(sampler)
    return SamplerCard(
        id=sampler.name,
        description=said.summary,
        paper=said.paper,
        available=reason is None,
        reason=reason,
        parameters=said.schema,
    )


def _broken_card(plugin: BrokenPlugin) -> SamplerCard:
    reason = f"the sampler of {plugin.distribution} could not be loaded: {plugin.reason}"
    return SamplerCard(id=plugin.name, description="", paper="", available=False, reason=reason, parameters={})
