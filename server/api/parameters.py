"""Parameters of samplers and modifiers: validated as a request gives them, and repeated in its answer."""

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
"""Bytes of its parameters that an answer repeats, once for each choice."""
MOST_PROMPT = 1024
"""Characters, or token ids, of a parameter that is a prompt which an answer repeats."""
Encode = Callable[[str, str | list[int]], list[int]]
"""The tokens of a prompt in the field of that name. Raises RequestError."""


def validate_params(owner: Owner, params: dict[str, Any], where: str, kind: str = "sampler") -> SamplerParams:
    """Parameters of a sampler or modifier.

    Raises RequestError, which names the parameter, and SamplerError if the sampler's own checks fail otherwise.
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
    # As JSON, which is what the parameters came as: strict validation takes a list for a tuple there.
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
    """The first error; of a parameter that may be of several types, of the one that the value is of."""
    first, *others = error.errors(include_url=False, include_context=False)
    field = owner.Params.model_fields.get(str(first["loc"][0])) if first["loc"] else None
    annotation = None if field is None else field.annotation
    if get_origin(annotation) not in (Union, UnionType) or len(set(get_args(annotation)) - {NoneType}) < 2:
        return first
    same = [first, *(each for each in others if each["loc"][0] == first["loc"][0])]
    found = next((each for each in same if not each["type"].endswith("_type")), first)
    return {**found, "loc": found["loc"][:1]}


def encoded(schema: Mapping[str, Any], params: SamplerParams, where: str, encode: Encode) -> SamplerParams:
    """Parameters with token ids in place of prompts. Raises RequestError."""
    return with_tokens(schema, params, lambda name, prompt: encode(f"{where}.{name}", prompt))


def stated(owner: Owner, params: SamplerParams, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters as an answer repeats them, long prompts shortened. Raises SamplerError if they cannot be told."""

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
