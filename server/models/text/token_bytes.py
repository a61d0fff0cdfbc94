"""Single tokens in a text: their bytes, and after which of them the text before can no longer change."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""Name of a token that stands for one byte."""


def _alphabet() -> dict[str, int]:
    """The byte for each character of byte-level tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


ALPHABET = _alphabet()


class TokenBytes:
    """What a tokenizer's decoder makes of single tokens."""

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
        """Whether a token is left out of texts: a special one, or none at all."""
        return id in self._special or self._tokenizer.id_to_token(id) is None

    def is_byte(self, id: int) -> bool:
        """Whether a token stands for a byte, which reads as text together with the bytes beside it."""
        return self.byte_fallback and BYTE.fullmatch(self._tokenizer.id_to_token(id) or "") is not None

    def of(self, id: int) -> bytes:
        """The bytes that a token stands for."""
        token = self._tokenizer.id_to_token(id) or ""
        if self.byte_level and all(character in ALPHABET for character in token):
            return bytes(ALPHABET[character] for character in token)
        if self.byte_fallback and (byte := BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self.byte_level:
            return token.encode()
        return self._tokenizer.decode([id], skip_special_tokens=False).encode()


class Boundaries:
    """Follows the tokens of a text. After each, says whether all text so far is certain, whatever comes next."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def certain_after(self, id: int) -> bool:
        if not self._tokens.local:
            return False
        if self._tokens.byte_level:
            self._characters.decode(self._tokens.of(id))
            return not self._characters.getstate()[0]
        # A run of bytes is text only if all of them are characters, so that it ends with the first other token.
        return not self._tokens.is_byte(id)


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The steps of a decoder, those of sequences one by one."""
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _steps(each)
    else:
        yield decoder


def _local(steps: list[dict[str, Any]]) -> bool:
    """Whether no step changes text across tokens. Once they are one text, only steps that read characters are such."""
    fused = False
    for i, step in enumerate(steps):
        kind = step["type"]
        if kind == "ByteLevel" and i:
            return False  # it reads bytes of what steps before it made
        one_character = kind == "Replace" and len(step["pattern"].get("String", "")) == 1
        if fused and kind not in ("Fuse", "Strip", "Metaspace") and not one_character:
            return False
        fused = fused or kind in ("Fuse", "ByteLevel")
    return True
