"""Parameters of samplers and modifiers: validation for requests, and repetition in responses."""

from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import structlog
from pydantic import ValidationError
from pydantic_core import ErrorDetails, to_json

from samplers import SamplerError, SamplerParams
from samplers.loop.guard import SHOWN, ContractError, Owner, failure, name_of, shown, told
from samplers.prompts import prompts_in, with_tokens
from server.api.errors import shortened
from server.api.schemas.bodies import request_error, show
from server.engine import RequestError

log = structlog.get_logger(__name__)

MOST_STATED = 16 * 1024
"""Maximum bytes of parameters that a response repeats, once for each choice."""
MOST_PROMPT = 1024
"""Maximum characters, or token ids, repeated by a response for a parameter that is a prompt."""
Encode = Callable[[str, str | list[int]], list[int]]
"""Function of a field's name and a prompt that returns the prompt's tokens. Raises RequestError."""


def validate_params(owner: Owner, params: dict[str, Any], where: str, kind: str = "sampler") -> SamplerParams:
    """Validate the parameters of a sampler or modifier.

    Raises RequestError, which names the parameter, or SamplerError if the sampler's own checks fail in another way.
    """
    refused: Exception
    try:
        return _validated(owner, params)
    except ValidationError as error:
        try:
            refused = _refusal(owner, error, where, kind)
        except BaseException as second:
            refused = failure(owner, second)
    except BaseException as error:
        refused = failure(owner, error)
    if isinstance(refused, SamplerError):
        log.error("parameters failed", error=str(refused), sampler=name_of(owner), exc_info=refused.__cause__)
    raise refused


def _validated(owner: Owner, params: dict[str, Any]) -> SamplerParams:
    # As JSON, the original format of the parameters: strict validation then accepts a list for a tuple.
    found: object = owner.Params.model_validate_json(to_json(params))
    if not isinstance(found, SamplerParams):
        raise TypeError("its parameters are none")
    return found


def _refusal(owner: Owner, error: ValidationError, where: str, kind: str) -> RequestError:
    details = _first(owner, error)
    refused = request_error(details, (where,))
    if details["type"] != "extra_forbidden":
        return RequestError(refused.field, shown(refused, 2 * SHOWN), refused.code)
    known = ", ".join(owner.Params.model_fields) or "none"
    name = show(details["loc"][0])
    return RequestError(
        refused.field, f"{kind} {name_of(owner)} has no parameter {name}; it has: {known}", refused.code
    )


def _first(owner: Owner, error: ValidationError) -> ErrorDetails:
    """The first error. For a parameter with several possible types, that of the type that the value has."""
    first, *others = error.errors(include_url=False, include_context=False)
    field = owner.Params.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    annotation = None if field is None else field.annotation
    if get_origin(annotation) not in (Union, UnionType) or len(set(get_args(annotation)) - {NoneType}) < 2:
        return first
    same = [first, *(each for each in others if each["loc"][0] == first["loc"][0])]
    found = next((each for each in same if not each["type"].endswith("_type")), first)
    return {**found, "loc": found["loc"][:1]}


def encoded(schema: Mapping[str, Any], params: SamplerParams, where: str, encode: Encode) -> SamplerParams:
    """The parameters with prompts replaced by token ids. Raises RequestError."""
    return with_tokens(schema, params, lambda name, prompt: encode(f"{where}.{name}", prompt))


def stated(owner: Owner, params: SamplerParams, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters as repeated in a response, with long prompts shortened. Raises SamplerError if that fails."""

    def dump() -> dict[str, Any]:
        found: object = params.model_dump(mode="json")
        if not isinstance(found, dict):
            raise TypeError("its parameters are no object")
        for name, value in prompts_in(schema or {}, params).items():
            found[name] = shortened(value, MOST_PROMPT) if isinstance(value, str) else value[:MOST_PROMPT]
        if len(to_json(found)) > MOST_STATED:
            raise ContractError(f"its parameters are more than {MOST_STATED} bytes")
        return found

    return told(owner, dump)
