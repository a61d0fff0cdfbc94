"""Sampler and modifiers of a request, resolved once; the engine does not look up names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from samplers import (
    Modifier,
    ParameterError,
    Sampler,
    SamplerError,
    SamplerParams,
    UnknownModifierError,
    UnknownSamplerError,
    describe_modifier,
    get_modifier,
    get_sampler,
    is_ours,
)
from samplers.loop.guard import shown, told, why_not
from samplers.resources import DEFAULT, ResourceTable, bound
from server.api.parameters import Encode, encoded, stated, validate_params
from server.api.schemas.requests import ModifierBody
from server.engine import ModelInfo, RequestError
from server.settings import Settings

MOST_NAME = 65
"""Number of characters of a sampler's name that are read, one more than a name may have."""
SHOWN_FIELD = 80
"""Maximum characters of a parameter's name reported by a sampler."""


class ChosenModifier(NamedTuple):
    """A modifier, with its parameters as they run and as the response repeats them."""

    modifier: Modifier[Any]
    params: SamplerParams
    stated: dict[str, Any]


class SamplerChoice(NamedTuple):
    """Sampler and modifiers of a request. `name` is the registered one, unaffected by later changes of the sampler."""

    sampler: Sampler
    params: SamplerParams
    name: str
    modifiers: Sequence[ChosenModifier] = ()


@dataclass(frozen=True)
class SamplerRequest:
    """Sampler settings of a request, before any code of the sampler has run.

    Attributes:
        name: name of an existing sampler.
        where: request field that `given` is in.
        given: parameters of the sampler; None selects those of the default.
        modifiers: names of existing modifiers, with parameters.
        modifiers_where: request field that they are in.
    """

    name: str
    where: str
    given: dict[str, Any] | None
    modifiers: Sequence[ModifierBody] = ()
    modifiers_where: str = "modifiers"


def find_sampler(name: str, field: str) -> Sampler:
    """The sampler of that name. Raises RequestError for `field`."""
    try:
        return get_sampler(name[:MOST_NAME])
    except UnknownSamplerError as error:
        raise RequestError(field, str(error), "unknown_sampler") from None


def check_modifiers(modifiers: Sequence[ModifierBody], where: str) -> None:
    """Raise RequestError if a modifier does not exist or is given twice."""
    for i, each in enumerate(modifiers):
        field = f"{where}.{i}.name"
        try:
            get_modifier(each.name[:MOST_NAME])
        except UnknownModifierError as error:
            raise RequestError(field, str(error), "unknown_modifier") from None
        if each.name in [before.name for before in modifiers[:i]]:
            raise RequestError(field, f"modifier {each.name} is there twice: name it once", "conflicting_values")


def default_sampler(settings: Settings, info: ModelInfo) -> SamplerChoice:
    """Sampler of requests that choose none, not yet bound to its auxiliaries.

    Raises RequestError for `sampler` or `sampler_params`.
    """
    name = settings.sampler or info.sampler
    sampler = find_sampler(name, "sampler")
    params = _default_params(sampler, settings)
    try:
        # A sampler whose auxiliaries may come and go, such as a policy, is bound at each request.
        missing = told(sampler, DEFAULT.why_missing, sampler)
        alone = sampler if missing else _bound(sampler, params, "sampler_params", DEFAULT)
    except SamplerError as error:
        raise RequestError("sampler", str(error)) from None
    if reason := why_not(alone, info.pattern):
        raise RequestError("sampler", reason)
    return SamplerChoice(sampler, params, name)


def check_default_sampler(settings: Settings) -> None:
    """Check the settings' sampler as far as is possible without a model. Raises RequestError as `default_sampler`."""
    if settings.sampler is not None:
        _default_params(find_sampler(settings.sampler, "sampler"), settings)


def _default_params(sampler: Sampler, settings: Settings) -> SamplerParams:
    try:
        return validate_params(sampler, settings.sampler_params, "sampler_params")
    except SamplerError as error:
        raise RequestError("sampler_params", str(error)) from None


def resolve(
    sampler_request: SamplerRequest, default: SamplerChoice, resources: ResourceTable, encode: Encode
) -> SamplerChoice:
    """The sampler of a request, bound to its auxiliaries, and its modifiers.

    Runs the sampler's own checks, whose duration is not limited. Raises RequestError, SamplerError.

    Args:
        encode: converts prompts in parameters to tokens.
    """
    sampler, params = default.sampler, default.params
    if sampler_request.given is not None:
        sampler = find_sampler(sampler_request.name, "sampler")
        params = validate_params(sampler, sampler_request.given, sampler_request.where)
    params = told(sampler, resources.named, sampler, params)
    modifiers = [
        _modifier(each, f"{sampler_request.modifiers_where}.{i}.params", encode)
        for i, each in enumerate(sampler_request.modifiers)
    ]
    return SamplerChoice(
        _bound(sampler, params, sampler_request.where, resources), params, sampler_request.name, modifiers
    )


def _bound(sampler: Sampler, params: SamplerParams, where: str, resources: ResourceTable) -> Sampler:
    """The sampler bound to its auxiliaries. Raises RequestError, and SamplerError if the sampler fails."""

    def ask() -> Sampler | ParameterError:
        try:
            return bound(sampler, params, resources)
        except ParameterError as error:
            refused = error
            return ParameterError(shown(lambda: refused.field, SHOWN_FIELD), shown(refused), refused.code)

    found = told(sampler, ask)
    if isinstance(found, ParameterError):
        field = found.field if found.field == "sampler" else f"{where}.{found.field}"
        raise RequestError(field, str(found), found.code)
    return found


def _modifier(given: ModifierBody, where: str, encode: Encode) -> ChosenModifier:
    modifier, schema = get_modifier(given.name), describe_modifier(given.name).schema
    params = validate_params(modifier, given.params or {}, where, "modifier")
    return ChosenModifier(modifier, encoded(schema, params, where, encode), stated(modifier, params, schema))


def runs_only_ours(sampler_request: SamplerRequest, default: SamplerChoice) -> bool:
    """True if the request runs only built-in samplers and modifiers."""
    if not is_ours(sampler_request.name):
        return False
    given: dict[str, Any] = sampler_request.given if sampler_request.given is not None else dict(default.params)
    others = [given.get(name) for name, kind in get_sampler(sampler_request.name).requires.items() if kind == "sampler"]
    return all(is_ours(name) for name in others if isinstance(name, str))
