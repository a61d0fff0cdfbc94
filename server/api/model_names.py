"""Resolution of a request's model name and sampler, from one table built at start-up."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
from pydantic import ValidationError
from pydantic_core import to_json

from policies.serving.store import PolicyStore, Stored, UnknownPolicyError
from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    Sampler,
    SamplerError,
    SamplerParams,
    UnknownSamplerError,
    get_sampler,
    named_samplers,
)
from samplers.learned.policy import Policy, PolicyParams
from samplers.loop.guard import SHOWN, ContractError, failure, name_of, shown, told, why_not
from server.api.errors import NotFoundError
from server.api.schemas.bodies import request_error, show
from server.api.schemas.requests import GenerationBody
from server.engine import ModelInfo, RequestError
from server.settings import Settings

log = structlog.get_logger(__name__)

MAX_STATED = 16 * 1024
"""Bytes of sampler parameters that a response repeats, once for each choice."""
MAX_NAME = 65
"""Characters of a sampler's name that are looked at, one more than a valid name has."""


class SamplerChoice(NamedTuple):
    """A sampler with its parameters. The name is the registry's, whatever a plugin's sampler reports later."""

    sampler: Sampler
    params: SamplerParams
    name: str


@dataclass(frozen=True)
class SamplerRequest:
    """Sampler asked for by a request, before any of the sampler's own code has run.

    Attributes:
        name: name of an existing sampler.
        where: field that contains `given`.
        given: the parameters; None selects the default's.
        policy: policy chosen by the model's name.
    """

    name: str
    where: str
    given: dict[str, Any] | None
    policy: str | None


def default_sampler(settings: Settings, info: ModelInfo) -> SamplerChoice:
    """Sampler of requests that choose none. Raises RequestError for `sampler` or `sampler_params`."""
    name = settings.sampler or info.sampler
    sampler = _sampler(name, "sampler")
    if reason := why_not(sampler, info.pattern):
        raise RequestError("sampler", reason)
    return SamplerChoice(sampler, _default_params(sampler, settings), name)


def check_default_sampler(settings: Settings) -> None:
    """Check the default sampler as far as possible without a model. Raises RequestError like `default_sampler`."""
    if settings.sampler is not None:
        _default_params(_sampler(settings.sampler, "sampler"), settings)


def _default_params(sampler: Sampler, settings: Settings) -> SamplerParams:
    try:
        return validate_params(sampler, settings.sampler_params)
    except SamplerError as error:
        raise RequestError("sampler_params", str(error)) from None


POLICY = "policy-"
"""Prefix of a policy's name in `model:policy-NAME`."""


class ModelNames:
    """Names of the served model, and the sampler or policy that each implies.

    Args:
        name: name of the served model.
        default: sampler and parameters of requests that choose neither.
        policies: store of the loaded policies, which may change at any time.
        pattern: attention pattern of the model.
    """

    def __init__(
        self, name: str, default: SamplerChoice, policies: PolicyStore, pattern: AttentionPattern = BIDIRECTIONAL
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.policies = policies
        self._default = default
        # Computed once: a plugin's answer may take any time, and is needed on the event loop.
        self._reasons = {each: why_not(sampler, pattern) for each, sampler in named_samplers().items()}

    def why_not(self, sampler: str) -> str | None:
        """Reason why the sampler cannot run with this model; None if it can."""
        return self._reasons.get(sampler)

    def names(self) -> list[str]:
        """The model's plain name, and its name with each sampler and loaded policy that can run with this model."""
        suffixes = [sampler for sampler in named_samplers() if not self.why_not(sampler)]
        if not self.why_not(Policy.name):
            suffixes += [f"{POLICY}{stored.name}" for stored in self.policies.list()]
        return [self.name, *(f"{self.name}:{suffix}" for suffix in suffixes)]

    def check_model(self, model: str | None) -> tuple[str | None, str | None]:
        """Names of the sampler and of the policy that a model name selects. Raises NotFoundError, RequestError."""
        if model is None or model == self.name:
            return None, None
        if model.startswith(f"{self.name}:"):
            suffix = model.removeprefix(f"{self.name}:")
            if suffix.startswith(POLICY):
                return Policy.name, self._policy(suffix.removeprefix(POLICY), "model").name
            _sampler(suffix, "model")
            return suffix, None
        raise NotFoundError("model", f"model {show(model)} is not served here: use {self.name!r}", "model_not_found")

    def choose(self, body: GenerationBody) -> SamplerRequest:
        """Determine the sampler and parameters that a request asks for. Raises NotFoundError, RequestError.

        The sampler is named by the model's suffix, by `sampler` or by `vllm_xargs.sampler`; several must agree.
        Parameters are those of the sampler in effect.
        """
        xargs = body.vllm_xargs
        suffix, policy = self.check_model(body.model)
        named = {
            "model": suffix,
            "sampler": body.sampler,
            "vllm_xargs.sampler": xargs and xargs.sampler,
        }
        params = {
            "sampler_params": body.sampler_params,
            "vllm_xargs.sampler_params": xargs and xargs.sampler_params,
        }
        _, name = _agreed(named)
        where, given = _agreed(params)
        if name is not None:
            _sampler(name, "sampler" if body.sampler is not None else "vllm_xargs.sampler")
            given = given or {}
        return SamplerRequest(name or self._default.name, where, given, policy)

    def sampler_choice(self, sampler_request: SamplerRequest) -> SamplerChoice:
        """Resolve a request's sampler. Runs the sampler's own validation, which may take any time.

        Raises RequestError, SamplerError.
        """
        if sampler_request.given is None:
            return self._named(self._default, sampler_request.where, sampler_request.policy)
        sampler = _sampler(sampler_request.name, "sampler")
        return self._named(
            SamplerChoice(
                sampler, validate_params(sampler, sampler_request.given, sampler_request.where), sampler_request.name
            ),
            sampler_request.where,
            sampler_request.policy,
        )

    def _named(self, choice: SamplerChoice, where: str, policy: str | None) -> SamplerChoice:
        """Fill in the name of the policy, if the sampler has one. Raises RequestError if it is not loaded."""
        if choice.name != Policy.name:
            return choice
        params = choice.params
        assert isinstance(params, PolicyParams)
        if policy is not None and params.policy not in (None, policy):
            message = f"{where}.policy says {show(params.policy)}, but model says {show(policy)}: send one of them"
            raise RequestError(f"{where}.policy", message, "conflicting_values")
        stored = self._policy(policy or params.policy, f"{where}.policy")
        return choice._replace(sampler=stored.sampler, params=params.model_copy(update={"policy": stored.name}))

    def _policy(self, name: str | None, field: str) -> Stored:
        try:
            return self.policies.get(name)
        except UnknownPolicyError as error:
            raise RequestError(field, str(error), "unknown_policy") from None


def validate_params(sampler: Sampler, params: dict[str, Any], where: str = "sampler_params") -> SamplerParams:
    """Validate a sampler's parameters.

    Raises RequestError that names the parameter, or SamplerError if the sampler's own validation fails otherwise.
    """
    refused: Exception
    try:
        return _validated(sampler, params)
    except ValidationError as error:
        try:
            refused = _refusal(sampler, error, where)
        except BaseException as second:
            refused = failure(sampler, second)
    except BaseException as error:
        refused = failure(sampler, error)
    if isinstance(refused, SamplerError):
        log.error("parameters failed", error=str(refused), sampler=name_of(sampler), exc_info=refused.__cause__)
    raise refused


def _validated(sampler: Sampler, params: dict[str, Any]) -> SamplerParams:
    # As JSON, the format the parameters arrived in: strict validation then accepts a list for a tuple.
    found: object = sampler.Params.model_validate_json(to_json(params))
    if not isinstance(found, SamplerParams):
        raise TypeError("its parameters are none")
    return found


def _refusal(sampler: Sampler, error: ValidationError, where: str) -> RequestError:
    details = error.errors(include_url=False, include_context=False)[0]
    refused = request_error(details, (where,))
    if details["type"] != "extra_forbidden":
        return RequestError(refused.field, shown(refused, 2 * SHOWN), refused.code)
    known = ", ".join(sampler.Params.model_fields) or "none"
    name = show(details["loc"][0])
    return RequestError(
        refused.field, f"sampler {name_of(sampler)} has no parameter {name}; it has: {known}", refused.code
    )


def stated(sampler: Sampler, params: SamplerParams) -> dict[str, Any]:
    """Parameters as repeated in a response. Raises SamplerError if they cannot be serialised."""

    def dump() -> dict[str, Any]:
        found: object = params.model_dump(mode="json")
        if not isinstance(found, dict):
            raise TypeError("its parameters are no object")
        if len(to_json(found)) > MAX_STATED:
            raise ContractError(f"its parameters are more than {MAX_STATED} bytes")
        return found

    return told(sampler, dump)


def _agreed(given: dict[str, Any]) -> tuple[str, Any]:
    """The field and value set in any of several fields. Raises RequestError if two values differ."""
    found = [(field, value) for field, value in given.items() if value is not None]
    for field, value in found[1:]:
        if value != found[0][1]:
            first = found[0][0]
            message = f"{field} says {show(value)}, but {first} says {show(found[0][1])}: send one of them"
            raise RequestError(field, message, "conflicting_values")
    return found[0] if found else (next(iter(given)), None)


def _sampler(name: str, field: str) -> Sampler:
    try:
        return get_sampler(name[:MAX_NAME])
    except UnknownSamplerError as error:
        raise RequestError(field, str(error), "unknown_sampler") from None
