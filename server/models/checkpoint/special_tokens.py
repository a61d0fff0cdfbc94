"""Mask and end tokens of a checkpoint, from its configuration files or its tokenizer."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

from server.models.families.registry import Family
from server.models.files import ModelError
from server.models.text.codec import TextCodec

log = structlog.get_logger(__name__)

MASK = re.compile(r"[<\[|].*mask.*[>\]|]", re.IGNORECASE)
"""Common spellings of mask tokens."""
CONFIG, GENERATION = "config.json", "generation_config.json"


def find_mask(
    folder: Path, config: dict[str, Any], generation: dict[str, Any], family: Family, text: TextCodec | None
) -> int | None:
    """Id of the mask token; None for a family without one. Raises ModelError if it cannot be determined.

    The original programs read it from `config.json` or `generation_config.json`, or take it as an argument that
    defaults to the published id. The files take precedence; the published id is used only if the tokenizer has a mask
    token there.
    """
    if not family.mask_tokens:
        return None
    declared = None if text is None else _declared_mask(text)
    for name, source in ((CONFIG, config), (GENERATION, generation)):
        said = source.get("mask_token_id")
        if said is None:
            continue
        (found,) = _ids(folder / name, "mask_token_id", [said])
        if declared not in (None, found):
            log.warning("mask token: the tokenizer declares another one", file=name, id=found, tokenizer=declared)
        return found
    if declared is not None:
        return declared
    if text is None:
        raise ModelError(f"{folder / CONFIG}: mask_token_id is not given")
    for token in family.mask_tokens:
        if (found_id := text.token_id(token)) is not None:
            return found_id
    published = family.mask_token_id
    if published is not None and published < text.vocab_size and MASK.fullmatch(text.token(published)):
        return published
    raise ModelError(
        f"{folder / CONFIG}: mask_token_id is not given, and the tokenizer neither declares a mask_token nor has "
        f"{' or '.join(family.mask_tokens)}"
    )


def find_ends(
    folder: Path, known: frozenset[int], generation: dict[str, Any], family: Family, text: TextCodec, rows: int
) -> frozenset[int]:
    """Tokens that end a text, from both configuration files and by name. Raises ModelError for an invalid id.

    Args:
        known: ids from `config.json`.
        rows: vocabulary size.
    """
    path = folder / GENERATION
    said = generation.get("eos_token_id")
    ends = known | set(_ids(path, "eos_token_id", said if isinstance(said, list) else [] if said is None else [said]))
    if outside := sorted(end for end in ends if not 0 <= end < rows):
        raise ModelError(f"{path}: eos_token_id {outside[0]} is outside the vocabulary of {rows}")
    declared = text.special_token("eos_token")
    names = family.end_tokens if ends or declared is None else (declared, *family.end_tokens)
    ends |= {found for token in names if (found := text.token_id(token)) is not None}
    if not ends:
        log.warning("no token ends a text: every generation will be as long as it may", model=str(folder))
    return frozenset(ends)


def _declared_mask(text: TextCodec) -> int | None:
    token = text.special_token("mask_token")
    return None if token is None else text.token_id(token)


def _ids(path: Path, key: str, values: Iterable[Any]) -> list[int]:
    found = []
    for value in values:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole and not (isinstance(value, float) and value.is_integer()):
            kind = "neither a number nor a list of numbers" if key == "eos_token_id" else f"{value!r}, not a number"
            raise ModelError(f"{path}: {key} is {kind}")
        found.append(int(value))
    return found
