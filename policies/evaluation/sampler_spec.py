"""A sampler with its parameters in one word, for command lines: `threshold:threshold=0.9`.

Modifiers follow it: `threshold:threshold=0.9+guidance:scale=1.5`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from policies.evaluation.oracle import Oracle
from samplers import Modifier, SamplerParams, describe_modifier, get_modifier, get_sampler
from samplers.prompts import with_tokens


@dataclass(frozen=True)
class ModifierSpec:
    """A modifier's name and its validated parameters."""

    name: str
    params: SamplerParams

    @classmethod
    def parse(cls, text: str) -> "ModifierSpec":
        """Read `name:param=value,param=value`. Raises UnknownModifierError, ValueError as `SamplerSpec.parse`."""
        name, values = _split(text)
        return cls(name, _validated(name, get_modifier(name).Params, values))

    def bound(self, encode: Callable[[str], list[int]]) -> tuple[Modifier[Any], SamplerParams]:
        """The modifier, and its parameters with prompts encoded."""
        params = with_tokens(
            describe_modifier(self.name).schema,
            self.params,
            lambda _, prompt: encode(prompt) if isinstance(prompt, str) else prompt,
        )
        return get_modifier(self.name), params

    def stated(self) -> dict[str, Any]:
        """Parameters that are not null, defaults included, as JSON values."""
        return self.params.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler's name, validated parameters and modifiers. `oracle` exists only in evaluation."""

    name: str
    params: SamplerParams
    modifiers: tuple[ModifierSpec, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "SamplerSpec":
        """Read `name` or `name:param=value,param=value`; values are JSON scalars, bare words are strings.

        Modifiers follow, with a `+` before each. Raises UnknownSamplerError, UnknownModifierError, or ValueError with
        one line that names the parameter.
        """
        first, *others = re.split(r"\+(?=[A-Za-z])", text)
        name, values = _split(first)
        modifiers = [ModifierSpec.parse(each) for each in others]
        refuse_twice([each.name for each in modifiers])
        return cls.create(name, values, modifiers)

    @classmethod
    def create(cls, name: str, values: dict[str, Any], modifiers: Sequence[ModifierSpec] = ()) -> "SamplerSpec":
        """Validate parameters. Raises UnknownSamplerError, or ValueError with one line that names the parameter."""
        schema = Oracle.Params if name == Oracle.name else get_sampler(name).Params
        return cls(name, _validated(name, schema, values), tuple(modifiers))

    def stated(self) -> dict[str, Any]:
        """Parameters that are not null, defaults included."""
        return self.params.model_dump(mode="json", exclude_none=True)

    def stated_modifiers(self) -> list[dict[str, Any]]:
        """The modifiers in the format of a request's body."""
        return [{"name": each.name, "params": each.stated()} for each in self.modifiers]


def refuse_twice(modifiers: Sequence[str]) -> None:
    """Raise ValueError if a modifier is named twice."""
    for name in modifiers:
        if modifiers.count(name) > 1:
            raise ValueError(f"modifier {name} is there twice: name it once")


def _validated(name: str, schema: type[SamplerParams], values: dict[str, Any]) -> SamplerParams:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{name}: {where + ': ' if where else ''}{first['msg']}") from None


def _split(text: str) -> tuple[str, dict[str, Any]]:
    """Name and values of `name:param=value,param=value`. Raises ValueError."""
    name, colon, rest = text.partition(":")
    values: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        param, equals, value = part.partition("=")
        if not (param and equals) or param in values:
            raise ValueError(f"{text!r} is not name:param=value,param=value")
        values[param] = _scalar(value)
    return name, values


def sampler_label(name: str, stated: dict[str, Any], modifiers: Sequence[dict[str, Any]] = ()) -> str:
    """A sampler and its parameters as a label: `topk k=4`, `threshold 0.9 + guidance scale=1.5`."""
    parts = [f"{value}" if param == name else f"{param}={value}" for param, value in stated.items()]
    own = " ".join([name, *parts])
    return " + ".join([own, *(sampler_label(each["name"], each["params"]) for each in modifiers)])


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
