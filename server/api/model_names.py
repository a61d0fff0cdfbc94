"""Resolution of a request's model name and sampler, from one table built at start-up."""

from typing import Any

from policies.serving.resources import resources_of
from policies.serving.store import PolicyStore, UnknownPolicyError
from samplers import (
    BIDIRECTIONAL,
    AttentionPattern,
    Modifier,
    Sampler,
    SamplerError,
    is_ours,
    list_modifiers,
    named_samplers,
)
from samplers.learned.policy import Policy
from samplers.loop.guard import incompatibility, told, why_not
from server.api.errors import NotFoundError
from server.api.parameters import Encode
from server.api.sampler_choice import SamplerChoice, SamplerRequest, check_modifiers, find_sampler, resolve
from server.api.schemas.bodies import show
from server.api.schemas.requests import GenerationBody
from server.engine import RequestError

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
        self.resources = resources_of(policies)
        self.default = default
        # Asked once: a third party's answer may take long, and the event loop needs it.
        self._reasons = {each: why_not(sampler, pattern) for each, sampler in named_samplers().items()}
        self._required = {each: _required(sampler) for each, sampler in named_samplers().items()}
        self._around = {each.name: self._why_not_around(each) for each in list_modifiers()}

    def why_not(self, sampler: str) -> str | None:
        """Reason why the sampler cannot run with this model; None if it can."""
        return self._reasons.get(sampler)

    def why_unavailable(self, sampler: str) -> str | None:
        """The same, or the reason why a requirement of the sampler is currently missing."""
        missing = (self.resources.missing(kind) for kind in self._required.get(sampler, ()))
        return self.why_not(sampler) or next((reason for reason in missing if reason is not None), None)

    def why_not_around(self, modifier: str) -> str | None:
        """Reason why the modifier fits no built-in sampler that runs with this model; None if it fits one."""
        return self._around.get(modifier)

    def _why_not_around(self, modifier: Modifier[Any]) -> str | None:
        fitting = [each for name, each in named_samplers().items() if is_ours(name) and not self._reasons[name]]
        reasons = [incompatibility(each, self.pattern, [modifier]) for each in fitting]
        return next(iter(reasons), None) if all(reasons) else None

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
                return Policy.name, self._policy(suffix.removeprefix(POLICY), "model")
            find_sampler(suffix, "model")
            return suffix, None
        raise NotFoundError("model", f"model {show(model)} is not served here: use {self.name!r}", "model_not_found")

    def choose(self, body: GenerationBody) -> SamplerRequest:
        """Sampler, parameters and modifiers that a request selects. Raises NotFoundError, RequestError.

        The sampler is named by the model's suffix, by `sampler` or by `vllm_xargs.sampler`; several must agree.
        Parameters are those of the sampler in effect.
        """
        xargs = body.vllm_xargs
        suffix, policy = self.check_model(body.model)
        _, name = _agreed(
            {"model": suffix, "sampler": body.sampler, "vllm_xargs.sampler": xargs and xargs.sampler},
        )
        where, given = _agreed(
            {"sampler_params": body.sampler_params, "vllm_xargs.sampler_params": xargs and xargs.sampler_params},
        )
        around, modifiers = _agreed({"modifiers": body.modifiers, "vllm_xargs.modifiers": xargs and xargs.modifiers})
        if name is not None:
            find_sampler(name, "sampler" if body.sampler is not None else "vllm_xargs.sampler")
            given = given or {}
        if policy is not None:
            given = _with_policy(given, policy, where)
        check_modifiers(modifiers or [], around)
        return SamplerRequest(name or self.default.name, where, given, modifiers or [], around)

    def sampler_choice(self, sampler_request: SamplerRequest, encode: Encode) -> SamplerChoice:
        """Resolved sampler and modifiers of a request (see `resolve`). Raises RequestError, SamplerError."""
        return resolve(sampler_request, self.default, self.resources, encode)

    def _policy(self, name: str, field: str) -> str:
        """Name of a loaded policy, checked. Raises RequestError."""
        try:
            return self.policies.get(name).name
        except UnknownPolicyError as error:
            raise RequestError(field, str(error), "unknown_policy") from None


def _agreed(given: dict[str, Any]) -> tuple[str, Any]:
    """The field and value set in any of several fields. Raises RequestError if two values differ."""
    found = [(field, value) for field, value in given.items() if value is not None]
    for field, value in found[1:]:
        if value != found[0][1]:
            first = found[0][0]
            message = f"{field} says {show(value)}, but {first} says {show(found[0][1])}: send one of them"
            raise RequestError(field, message, "conflicting_values")
    return found[0] if found else (next(iter(given)), None)


def _with_policy(given: dict[str, Any], policy: str, where: str) -> dict[str, Any]:
    """The parameters with the policy selected by the model's name. Raises RequestError if they name another."""
    if given.get("policy") not in (None, policy):
        field = f"{where}.policy"
        message = f"{field} says {show(given['policy'])}, but model says {show(policy)}: send one of them"
        raise RequestError(field, message, "conflicting_values")
    return {**given, "policy": policy}


def _required(sampler: Sampler[Any]) -> tuple[str, ...]:
    """Kinds of the auxiliaries that a sampler requires."""
    try:
        return told(sampler, lambda: tuple(map(str, sampler.requires.values())))
    except SamplerError:
        return ()
