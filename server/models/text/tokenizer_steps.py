"""Bounds on the expansion of a text by a tokenizer's steps around its model, checked before any text is encoded."""

import json
import math
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from server.models.files import ModelError

MAX_GROWTH = 256
"""Characters that the steps before a tokenizer's model, or after it, may make of one. Usual: up to 3."""
MAX_AROUND = 1024
"""Tokens that may be added around a text. Usual: 2."""
MAX_STEPS = 64
"""Steps of one kind. Usual: up to 10."""
MAX_STATE = 8 << 20
"""Characters of the description of the steps of one kind. Character maps have up to half a million."""
MAX_ADDED = 65_536
"""Tokens added to the vocabulary. Text models have up to some thousands, multimodal models more."""

LISTS = ("normalizers", "pretokenizers", "processors", "decoders")
GROWTH = {"ByteLevel": 5, "NFKC": 18, "NFKD": 18, "NFC": 3, "NFD": 4, "Lowercase": 2, "BertNormalizer": 12}
"""Maximum characters that a step makes of one, where its settings do not tell: of a byte, of a ligature, and so on.

`ByteLevel` may also put a space in front of each piece.
"""
BEFORE, AFTER = ("normalizer", "pre_tokenizer"), "decoder"


def check_steps(tokenizer: Tokenizer, path: Path) -> None:
    """Raise ModelError for a tokenizer whose steps could expand a text too much. Does not run them."""
    steps = {kind: _steps(tokenizer, kind, path) for kind in (*BEFORE, "post_processor", AFTER)}
    for kinds in (BEFORE, (AFTER,)):
        growth = math.prod(_growth(step) for kind in kinds for step in steps[kind])
        if growth > MAX_GROWTH:
            of = " and ".join(kind.replace("_", "-") for kind in kinds if steps[kind])
            raise ModelError(f"{path}: its {of} may make {growth} characters of one, more than {MAX_GROWTH}")
    around, times = 0, 1
    for step in steps["post_processor"]:
        more, again = _surrounding_tokens(step)
        around, times = around * again + more, times * again
    if times > 1:
        raise ModelError(f"{path}: its post-processor repeats the text")
    if around > MAX_AROUND:
        raise ModelError(f"{path}: its post-processor puts {around} tokens around a text, more than {MAX_AROUND}")
    if (added := len(tokenizer.get_added_tokens_decoder())) > MAX_ADDED:
        raise ModelError(f"{path}: it adds {added} tokens to its vocabulary, more than {MAX_ADDED}")


def _steps(tokenizer: Tokenizer, kind: str, path: Path) -> list[dict[str, Any]]:
    """Steps of a kind, flattened, in order. Raises ModelError."""
    if getattr(tokenizer, kind) is None:
        return []
    state = getattr(tokenizer, kind).__getstate__()
    if len(state) > MAX_STATE:
        raise ModelError(f"{path}: its {kind.replace('_', '-')} has more than {MAX_STATE} characters")
    steps = list(_flat(json.loads(state)))
    if len(steps) > MAX_STEPS:
        raise ModelError(f"{path}: its {kind.replace('_', '-')} has {len(steps)} steps, more than {MAX_STEPS}")
    return steps


def _flat(step: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if step["type"] != "Sequence":
        yield step
        return
    for name in LISTS:
        for each in step.get(name, ()):
            yield from _flat(each)


def _growth(step: dict[str, Any]) -> int:
    """Maximum number of characters that a step makes of one."""
    kind = step["type"]
    if kind == "Replace":
        # A literal text matches itself only; a regular expression may match between all characters too.
        found = len(step["pattern"].get("String", ""))
        return math.ceil(len(step["content"]) / found) or 1 if found else 1 + len(step["content"])
    if kind in ("Prepend", "Metaspace"):
        return 1 + len(step.get("prepend", " "))
    if kind == "Precompiled":
        return _longest(b64decode(step["precompiled_charsmap"]))
    return GROWTH.get(kind, 1)


def _longest(table: bytes) -> int:
    """Bytes of the longest replacement in a map, whose format is: length of the index, index, texts ending in 0."""
    return max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")), default=1) or 1


def _surrounding_tokens(step: dict[str, Any]) -> tuple[int, int]:
    """Number of tokens that a post-processor adds to a text, and how often it includes the text."""
    if step["type"] != "TemplateProcessing":
        return 2, 1  # or none
    ids = {name: len(token["ids"]) for name, token in step["special_tokens"].items()}
    pieces = [next(iter(piece.items())) for piece in step["single"]]
    return sum(ids[piece["id"]] for what, piece in pieces if what == "SpecialToken"), sum(
        what == "Sequence" for what, _ in pieces
    )
