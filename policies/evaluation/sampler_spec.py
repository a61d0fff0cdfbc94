"""Samplers with parameters as one word of a command line: `threshold:threshold=0.9`."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from policies.evaluation.oracle import Oracle
from samplers import SamplerParams, get_sampler


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler's name and its validated parameters. The name `oracle` exists in evaluation only."""

    name: str
    params: SamplerParams

    @classmethod
    def parse(cls, text: str) -> "SamplerSpec":
        """Read `name` or `name:param=value,param=value`; values are JSON scalars, bare words are strings.

        Raises UnknownSamplerError, or ValueError with one line that names the parameter.
        """
        name, colon, rest = text.partition(":")
        values: dict[str, Any] = {}
        for part in rest.split(",") if colon else ():
            param, equals, value = part.partition("=")
            if not (param and equals) or param in values:
                raise ValueError(f"{text!r} is not name:param=value,param=value")
            values[param] = _scalar(value)
        return cls.create(name, values)

    @classmethod
    def create(cls, name: str, values: dict[str, Any]) -> "SamplerSpec":
        """Validate parameters. Raises UnknownSamplerError, or ValueError with one line that names the parameter."""
        schema = Oracle.Params if name == Oracle.name else get_sampler(name).Params
        try:
            return cls(name, schema.model_validate(values))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{name}: {where + ': ' if where else ''}{first['msg']}") from None

    def stated(self) -> dict[str, Any]:
        """Parameters that are not null, defaults included, as JSON values."""
        return self.params.model_dump(mode="json", exclude_none=True)


def sampler_label(name: str, stated: dict[str, Any]) -> str:
    """Label of a sampler and its parameters: `topk k=4`, `threshold 0.9`."""
    parts = [f"{value}" if param == name else f"{param}={value}" for param, value in stated.items()]
    return " ".join([name, *parts])


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
