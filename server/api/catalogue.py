"""What a request can choose: the served model's names and the samplers, in one table built at start-up."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from samplers import Sampler, SamplerParams, UnknownSamplerError, get_sampler, list_samplers
from server.api.bodies import request_error, show
from server.api.errors import NotFoundError
from server.api.requests import GenerationBody
from server.engine import RequestError
from server.settings import Settings

Rule = tuple[Sampler, SamplerParams]
"""What denoises a request."""


def default_rule(settings: Settings) -> Rule:
    """What the settings choose. Raises RequestError for `sampler` or `sampler_params`."""
    sampler = _sampler(settings.sampler, "sampler")
    return sampler, validate_params(sampler, settings.sampler_params)


class Catalogue:
    """The names that the served model goes by, and what each of them implies.

    Args:
        name: the served model.
        default: what requests get that choose neither sampler nor parameters.

    Attributes:
        names: model id -> sampler that it chooses, None for the plain name.
    """

    def __init__(self, name: str, default: Rule) -> None:
        self.name = name
        self.names: dict[str, Sampler | None] = {name: None}
        self.names |= {f"{name}:{each.name}": each for each in list_samplers()}
        self._default = default

    def check_model(self, model: str | None) -> Sampler | None:
        """The sampler that a model's name chooses. Raises NotFoundError, RequestError."""
        if model is None:
            return None
        if model in self.names:
            return self.names[model]
        if model.startswith(f"{self.name}:"):
            _sampler(model.removeprefix(f"{self.name}:"), "model")
        raise NotFoundError("model", f"model {model[:200]!r} is not served here: use {self.name!r}", "model_not_found")

    def choose(self, body: GenerationBody) -> Rule:
        """Sampler and parameters of a request. Raises NotFoundError, RequestError.

        The sampler is named by the model's suffix, by `sampler` or by `vllm_xargs.sampler`; by more than one only if
        they agree. Parameters are those of the sampler in force.
        """
        xargs = body.vllm_xargs
        suffix = self.check_model(body.model)
        named = {
            "model": suffix and suffix.name,
            "sampler": body.sampler,
            "vllm_xargs.sampler": xargs and xargs.sampler,
        }
        params = {
            "sampler_params": body.sampler_params,
            "vllm_xargs.sampler_params": xargs and xargs.sampler_params,
        }
        _, name = _agreed(named)
        where, given = _agreed(params)
        if name is None and given is None:
            return self._default
        field = "sampler" if body.sampler is not None else "vllm_xargs.sampler"
        sampler = self._default[0] if name is None else _sampler(name, field)
        return sampler, validate_params(sampler, given or {}, where)


def validate_params(sampler: Sampler, params: dict[str, Any], where: str = "sampler_params") -> SamplerParams:
    """A sampler's parameters. Raises RequestError, which names the parameter."""
    try:
        # As JSON, which is what the parameters came as: strict validation takes a list for a tuple there.
        return sampler.Params.model_validate_json(to_json(params))
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)[0]
        failure = request_error(details, (where,))
        if details["type"] != "extra_forbidden":
            raise failure from None
        known = ", ".join(sampler.Params.model_fields) or "none"
        raise RequestError(
            failure.field,
            f"sampler {sampler.name} has no parameter {details['loc'][0]!r}; it has: {known}",
            failure.code,
        ) from None


def _agreed(given: dict[str, Any]) -> tuple[str, Any]:
    """The one value that is given in any of several fields, and where. Raises RequestError if two differ."""
    found = [(field, value) for field, value in given.items() if value is not None]
    for field, value in found[1:]:
        if value != found[0][1]:
            first = found[0][0]
            message = f"{field} says {show(value)}, but {first} says {show(found[0][1])}: send one of them"
            raise RequestError(field, message, "conflicting_values")
    return found[0] if found else (next(iter(given)), None)


def _sampler(name: str, field: str) -> Sampler:
    try:
        return get_sampler(name[:200])
    except UnknownSamplerError as error:
        raise RequestError(field, str(error), "unknown_sampler") from None
