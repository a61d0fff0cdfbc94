"""Parameters that are prompts: a text in one is encoded as the prompts of the request are."""

from collections.abc import Callable, Mapping
from typing import Any

from samplers.contract import SamplerParams

PROMPT = "x-prompt"
"""Extra of a parameter's JSON schema that marks it."""


def prompts_in(schema: Mapping[str, Any], params: SamplerParams) -> dict[str, Any]:
    """Parameters that are prompts and have a value: a text or token ids, by name."""
    marked = [name for name, field in schema.get("properties", {}).items() if field.get(PROMPT)]
    return {name: value for name in marked if (value := getattr(params, name)) is not None}


def with_tokens(
    schema: Mapping[str, Any], params: SamplerParams, encode: Callable[[str, Any], list[int]]
) -> SamplerParams:
    """Parameters with token ids in place of prompts.

    Args:
        encode: gets a parameter's name and its value, and returns token ids.
    """
    found = prompts_in(schema, params)
    return params.model_copy(update={name: encode(name, value) for name, value in found.items()}) if found else params
