"""Prompts as parameters: their texts are encoded like the prompts of the request."""

from collections.abc import Callable, Mapping
from typing import Any

from samplers.contract import SamplerParams

PROMPT = "x-prompt"
"""Extra key in the JSON schema that marks a parameter as a prompt."""


def prompts_in(schema: Mapping[str, Any], params: SamplerParams) -> dict[str, Any]:
    """Values of the parameters that are prompts, by name: a text or token ids; nulls are left out."""
    marked = [name for name, field in schema.get("properties", {}).items() if field.get(PROMPT)]
    return {name: value for name in marked if (value := getattr(params, name)) is not None}


def with_tokens(
    schema: Mapping[str, Any], params: SamplerParams, encode: Callable[[str, Any], list[int]]
) -> SamplerParams:
    """The parameters with prompts replaced by token ids.

    Args:
        encode: maps a parameter's name and value to token ids.
    """
    found = prompts_in(schema, params)
    return params.model_copy(update={name: encode(name, value) for name, value in found.items()}) if found else params
