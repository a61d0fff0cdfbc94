"""Special tokens in a tokenizer's settings."""

from collections.abc import Iterable
from typing import Any


def named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Tokens of the settings' `..._token` entries, which are strings or objects with `content`.

    Includes `extra_special_tokens`, where transformers 5 keeps a model's additional ones.
    """
    own = settings.get("extra_special_tokens")
    found = {}
    for name, value in {**(own if isinstance(own, dict) else {}), **settings}.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def flagged_tokens(settings: dict[str, Any]) -> set[str]:
    """Tokens with a model-specific name, or flagged as special in `added_tokens_decoder`."""
    own, decoder = settings.get("extra_special_tokens"), settings.get("added_tokens_decoder")
    entries = [
        entry.get("content")
        for entry in (decoder.values() if isinstance(decoder, dict) else [])
        if isinstance(entry, dict) and entry.get("special") is True
    ]
    return _texts([*entries, *(own.values() if isinstance(own, dict) else [])])


def listed_tokens(settings: dict[str, Any]) -> set[str]:
    """Tokens in lists of special tokens."""
    lists = [settings.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    return _texts(entry for each in lists if isinstance(each, list) for entry in each)


def _texts(values: Iterable[Any]) -> set[str]:
    return {value for value in values if isinstance(value, str)}
