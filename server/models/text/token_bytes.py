"""Bytes of single tokens, and the tokens after which the text so far is final."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""Name of a byte token."""


def _alphabet() -> dict[str, int]:
    """Byte of each character in byte-level tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


ALPHABET = _alphabet()


class TokenBytes:
    """Effect of a tokenizer's decoder on single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        decoder = tokenizer.decoder
        steps = [] if decoder is None else list(_steps(json.loads(decoder.__getstate__())))
        kinds = [step["type"] for step in steps]
        self._tokenizer = tokenizer
        self._special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self.byte_level = "ByteLevel" in kinds
        self.byte_fallback = "ByteFallback" in kinds
        self.local = _local(steps)
        """A token changes the text of its neighbours only where they make a character together."""

    def is_special(self, id: int) -> bool:
        return id in self._special

    def silent(self, id: int) -> bool:
        """True if texts omit the token: a special token, or an id without one."""
        return id in self._special or self._tokenizer.id_to_token(id) is None

    def is_byte(self, id: int) -> bool:
        """True if the token is a single byte, whose text depends on the bytes beside it."""
        return self.byte_fallback and BYTE.fullmatch(self._tokenizer.id_to_token(id) or "") is not None

    def of(self, id: int) -> bytes:
        """Bytes of a token."""
        token = self._tokenizer.id_to_token(id) or ""
        if self.byte_level and all(character in ALPHABET for character in token):
            return bytes(ALPHABET[character] for character in token)
        if self.byte_fallback and (byte := BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self.byte_level:
            return token.encode()
        return self._tokenizer.decode([id], skip_special_tokens=False).encode()


class Boundaries:
    """Follows the tokens of a text and reports after each if the text so far is final, whatever comes next."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def certain_after(self, id: int) -> bool:
        if not self._tokens.local:
            return False
        if self._tokens.byte_level:
            self._characters.decode(self._tokens.of(id))
            return not self._characters.getstate()[0]
        # Adjacent byte tokens decode together, and only if all are valid, so that another token ends the uncertainty.
        return not self._tokens.is_byte(id)


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps of a decoder, with sequences flattened."""
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _steps(each)
    else:
        yield decoder


def _local(steps: list[dict[str, Any]]) -> bool:
    """True if no step changes text across tokens. After `Fuse`, only steps on single characters qualify."""
    fused = False
    for i, step in enumerate(steps):
        kind = step["type"]
        if kind == "ByteLevel" and i:
            return False  # it reads bytes produced by the steps before it
        one_character = kind == "Replace" and len(step["pattern"].get("String", "")) == 1
        if fused and kind not in ("Fuse", "Strip", "Metaspace") and not one_character:
            return False
        fused = fused or kind in ("Fuse", "ByteLevel")
    return True
