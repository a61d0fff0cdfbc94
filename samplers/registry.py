"""Samplers by name: our own, and those of third parties from the entry point group `unmask.samplers`."""

import inspect
import json
from dataclasses import dataclass
from functools import cache
from typing import Any

from samplers.attention_pattern import BIDIRECTIONAL, AttentionPattern
from samplers.contract import Modifier, Sampler, SamplerParams
from samplers.drafting.diffusion_gemma import DiffusionGemma
from samplers.learned.policy import Policy
from samplers.loop.guard import incompatibility
from samplers.loop.traits import Traits
from samplers.modifiers.credit import Credit, CreditThreshold
from samplers.modifiers.guidance import Guidance
from samplers.modifiers.spacing import Spacing
from samplers.particles.smc import SMC
from samplers.plugins import BrokenPlugin, Plugins, load_plugins
from samplers.revising.edit import Edit
from samplers.revising.hierarchy_remask import HierarchyRemask
from samplers.revising.saber import Saber
from samplers.rules.dream import Dream
from samplers.rules.entropy import Entropy
from samplers.rules.entropy_bound import EntropyBound
from samplers.rules.factor import Factor
from samplers.rules.hierarchy import Hierarchy
from samplers.rules.local_leap import LocalLeap
from samplers.rules.margin import Margin
from samplers.rules.random import Random
from samplers.rules.sequential import Sequential
from samplers.rules.threshold import Threshold
from samplers.rules.topk import TopK

_OURS: tuple[type[Sampler[Any]], ...] = (
    Random,
    Sequential,
    TopK,
    Threshold,
    Factor,
    Margin,
    Entropy,
    EntropyBound,
    Dream,
    Hierarchy,
    LocalLeap,
    HierarchyRemask,
    CreditThreshold,
    Edit,
    Saber,
    SMC,
    DiffusionGemma,
    Policy,
)
_MODIFIERS: tuple[type[Modifier[Any]], ...] = (Guidance, Credit, Spacing)


_ELSEWHERE = ("oracle",)
"""Names reserved by evaluation for its own samplers."""
_POLICY_SUFFIX = "policy-"
"""Reserved prefix of sampler names: `model:policy-NAME` selects a policy."""


MOST_TEXT = 100_000
"""Maximum characters of a sampler's description, including the schema of its parameters."""


@dataclass(frozen=True)
class Description:
    """A sampler's description, read once: its first sentence, its source, and the schema of its parameters."""

    summary: str
    paper: str
    schema: dict[str, Any]

    @classmethod
    def of(cls, sampler: Sampler[Any] | Modifier[Any]) -> "Description":
        """Read a description. Raises any error of the sampler, and an error if the description cannot be shown."""
        told: list[object] = [sampler.summary(), sampler.paper, sampler.schema()]
        said = json.dumps(told, allow_nan=False, ensure_ascii=False)
        if len(said) > MOST_TEXT:
            raise ValueError(f"its description has more than {MOST_TEXT} characters")
        said.encode()  # raises for lone surrogates, which a response cannot contain
        summary, paper, schema = json.loads(said)
        for name, text in (("summary", summary), ("paper", paper)):
            if not isinstance(text, str):
                raise TypeError(f"{name} is not text")
        if not isinstance(schema, dict):
            raise TypeError("schema is not an object")
        return cls(summary, paper, schema)

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters."""
        found = self.schema.get("properties")
        return list(found) if isinstance(found, dict) else []


class UnknownSamplerError(KeyError):
    """Unknown name of a sampler. The message lists the available samplers and names plugins that failed to load."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def _registry() -> dict[str, Sampler[Any]]:
    return {sampler.name: sampler() for sampler in _OURS} | _plugins().found


@cache
def _plugins() -> Plugins[Sampler[Any]]:
    taken = {*(sampler.name for sampler in _OURS), *_ELSEWHERE}
    return load_plugins("unmask.samplers", Sampler, taken, _check)  # type: ignore[type-abstract]


def _check(sampler: Sampler[Any]) -> None:
    """Raise if the attributes of a sampler that are read before it runs are missing or cannot be shown."""
    # Every request reads these again; a computed attribute could fail or change later.
    plain = type(inspect.getattr_static(sampler, "name")) is str
    if not plain or not isinstance(inspect.getattr_static(sampler, "Params"), type):
        raise TypeError("name or Params is no plain attribute")
    if type(sampler).__getattribute__ is not object.__getattribute__:
        raise TypeError("its attributes are computed when they are read")
    if sampler.name.startswith(_POLICY_SUFFIX):
        raise ValueError(f"names that begin with {_POLICY_SUFFIX!r} stand for policies")
    params: object = sampler.Params
    if not (isinstance(params, type) and issubclass(params, SamplerParams)):
        raise TypeError("Params is not a SamplerParams class")
    _descriptions()[sampler.name] = Description.of(sampler)
    Traits.of(sampler)
    for pattern in (
        BIDIRECTIONAL,
        AttentionPattern(causal_block=4),
        AttentionPattern(shifted=True),
        AttentionPattern(noise=4),
    ):
        incompatibility(sampler, pattern)


@cache
def _descriptions() -> dict[str, Description]:
    return {}


def describe(name: str) -> Description:
    """Description of the sampler of that name; third-party samplers were asked when they were loaded.

    Raises UnknownSamplerError.
    """
    sampler, known = get_sampler(name), _descriptions()
    if name not in known:
        known[name] = Description.of(sampler)
    return known[name]


class UnknownModifierError(KeyError):
    """Unknown name of a modifier. The message lists the available ones."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def _modifiers() -> dict[str, Modifier[Any]]:
    return {modifier.name: modifier() for modifier in _MODIFIERS}


def list_modifiers() -> list[Modifier[Any]]:
    """All modifiers."""
    return list(_modifiers().values())


def get_modifier(name: str) -> Modifier[Any]:
    """The modifier of that name. Raises UnknownModifierError."""
    found = _modifiers().get(name)
    if found is None:
        raise UnknownModifierError(f"unknown modifier {name!r}; choose from {', '.join(_modifiers())}")
    return found


@cache
def describe_modifier(name: str) -> Description:
    """Description of the modifier of that name. Raises UnknownModifierError."""
    return Description.of(get_modifier(name))


def is_ours(name: str) -> bool:
    """True for built-in samplers, False for those of third parties."""
    return any(name == sampler.name for sampler in _OURS)


def named_samplers() -> dict[str, Sampler[Any]]:
    """All samplers by their registered names, which later changes of a sampler's `name` do not affect."""
    return dict(_registry())


def list_samplers() -> list[Sampler[Any]]:
    """All samplers."""
    return list(_registry().values())


def list_unavailable() -> list[BrokenPlugin]:
    """Samplers of other distributions that failed to load."""
    return list(_plugins().broken.values())


def get_sampler(name: str) -> Sampler[Any]:
    """The sampler of that name. Raises UnknownSamplerError."""
    found = _registry().get(name)
    if found is None:
        choices = f"choose from {', '.join(_registry())}"
        if broken := _plugins().broken.get(name):
            reason = f"sampler {name!r} of {broken.distribution} could not be loaded: {broken.reason}"
            raise UnknownSamplerError(f"{reason}; {choices}")
        raise UnknownSamplerError(f"unknown sampler {name!r}; {choices}")
    return found
