"""`/v1/samplers`"""

from functools import lru_cache

from fastapi import FastAPI, Request, Response

from samplers import BrokenPlugin, describe, describe_modifier, list_modifiers, list_unavailable, named_samplers
from samplers.registry import Description
from server.api.errors import NotFoundError
from server.api.schemas.bodies import show
from server.api.schemas.openapi import ERRORS, LOOKUP_ERRORS
from server.api.schemas.responses import SamplerCard, SamplerList, json_response
from server.api.serving import Serving

MODIFIER = "modifier"
KIND = {"name": "kind", "in": "query", "required": False, "schema": {"type": "string", "enum": ["sampler", MODIFIER]}}
"""A query parameter, for the document; whatever else it says finds nothing."""


def add_routes(app: FastAPI, serving: Serving) -> None:
    names = serving.model_names

    @lru_cache(maxsize=2)
    def cards(
        reasons: tuple[tuple[str, int, str | None], ...], broken: tuple[BrokenPlugin, ...]
    ) -> tuple[list[SamplerCard], bytes]:
        """All cards, and as JSON: schemas take long to make, and depend on nothing else."""
        found = [_card(describe(name), name, reason) for name, _, reason in reasons]
        found += [_broken_card(plugin) for plugin in broken]
        for modifier in list_modifiers():
            said = describe_modifier(modifier.name)
            found.append(
                _card(said, modifier.name, names.why_not_around(modifier.name)).model_copy(update={"kind": MODIFIER})
            )
        return found, SamplerList(data=found).model_dump_json().encode()

    def current() -> tuple[list[SamplerCard], bytes]:
        # By name and identity: a third party's sampler may not say well whether it equals another.
        there = ((name, id(sampler), names.why_unavailable(name)) for name, sampler in named_samplers().items())
        return cards(tuple(there), tuple(list_unavailable()))

    @app.get("/v1/samplers", response_model=SamplerList, responses=ERRORS, tags=["catalogue"])
    async def samplers() -> Response:
        """List the samplers, and the modifiers around them, with the schema of their parameters."""
        return Response(current()[1], media_type="application/json")

    @app.get(
        "/v1/samplers/{sampler:path}",
        response_model=SamplerCard,
        responses=LOOKUP_ERRORS,
        openapi_extra={"parameters": [KIND]},
        tags=["catalogue"],
    )
    async def one_sampler(request: Request, sampler: str) -> Response:
        """Look up one sampler or modifier; `?kind=modifier` where a sampler has the same name."""
        kind = request.query_params.get("kind")
        found = [card for card in current()[0] if card.id == sampler and kind in (None, card.kind)]
        if not found:
            there = dict.fromkeys(card.id for card in current()[0])
            message = f"there is no sampler {show(sampler)}; there are {', '.join(there)}"
            raise NotFoundError("sampler", message, "sampler_not_found")
        return json_response(found[0])


def _card(said: Description, name: str, reason: str | None) -> SamplerCard:
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
