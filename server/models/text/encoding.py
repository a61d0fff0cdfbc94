"""Encoding without holding the interpreter lock, and lower bounds of a text's number of tokens."""

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Encoding, Tokenizer, models

from server.models.text.token_bytes import ALPHABET

UNICODE_FORMS = 4
"""Maximum ratio of a text's bytes to those of its normal form or lower case."""
CHARACTER = 4
"""Maximum bytes of a character."""
PIECE = 1 << 16
"""Characters processed at a time, after which another thread may run."""
LOSSLESS_STEPS = frozenset(
    ("ByteLevel", "Digits", "FixedLength", "Metaspace", "Punctuation", "Split", "UnicodeScripts", "Sequence")
)
"""Pre-tokenizers that preserve the whole text, unless configured otherwise."""


def one_encoding(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False, named: bool = False) -> Encoding:
    """Encode a text.

    Encoding a batch releases the interpreter lock, which a long text would hold for a second.

    Args:
        named: also compute each token's name and position, which takes longer.
    """
    encode = tokenizer.encode_batch if named else tokenizer.encode_batch_fast
    (encoding,) = encode([text], add_special_tokens=add_special_tokens)
    return encoding


def whole(text: str) -> str:
    """Text with lone surrogates replaced by U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TokenBound:
    """Lower bound of a text's number of tokens from its length: no token has more bytes than the longest one.

    Returns 0 for tokenizers with a token of unlimited length, such as one for all unknown text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder().values()
        shrinks, self._loses_spaces = _shrinks(_state(tokenizer.normalizer))
        self._loses_spaces |= any(token.lstrip or token.rstrip for token in added)
        steps = list(_steps(_state(tokenizer.pre_tokenizer)))
        byte_level = any(step["type"] == "ByteLevel" for step in [*steps, *_steps(_state(tokenizer.normalizer))])
        keeps = all(step["type"] in LOSSLESS_STEPS and step.get("behavior") != "Removed" for step in steps)
        self.bytes_per_token: int | None = None
        """Bytes of the text for each token, at most; None where that cannot be told."""
        if shrinks is not None and keeps and _knows_all(tokenizer.model, byte_level):
            pieces = tokenizer.get_vocab(with_added_tokens=False)
            # In a byte-level vocabulary each character is a byte.
            longest = max((len(piece) if byte_level else len(piece.encode()) for piece in pieces), default=0)
            named = max((len(token.content.encode()) for token in added), default=0)
            self.bytes_per_token = shrinks * max(longest, named, CHARACTER)

    def at_least(self, text: str) -> int:
        """Minimum number of tokens, without special ones around the text; 0 if there is no bound."""
        if self.bytes_per_token is None:
            return 0
        if self._loses_spaces:
            pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
            size = sum(_bytes("".join(piece.split())) for piece in pieces)
        else:
            size = _bytes(text)
        return -(-size // self.bytes_per_token)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _state(component: Any) -> dict[str, Any]:
    """Serialised state of a part of a tokenizer; an empty sequence if it is missing."""
    if component is None:
        return {"type": "Sequence"}
    found: dict[str, Any] = json.loads(component.__getstate__())
    return found


def _steps(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Steps of a part, with sequences flattened."""
    yield state
    for each in state.get("pretokenizers") or state.get("normalizers") or ():
        yield from _steps(each)


def _shrinks(normalizer: dict[str, Any]) -> tuple[int | None, bool]:
    """Maximum ratio of bytes before to after a normalizer (None: unbounded), and True if it can remove spaces."""
    factor, spaces = 1, False
    for step in _steps(normalizer):
        match step["type"]:
            case "Sequence" | "Prepend" | "ByteLevel":
                pass
            case "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase":
                factor *= UNICODE_FORMS
            case "Strip":
                spaces = True
            case "Replace" if (old := step["pattern"].get("String")) and step["content"]:
                factor *= max(1, -(-len(old.encode()) // len(step["content"].encode())))
            case _:
                return None, spaces
    return factor, spaces


def _knows_all(model: Any, byte_level: bool) -> bool:
    """True if every character becomes part of a token with its own text, or one unknown token by itself."""
    if getattr(model, "continuing_subword_prefix", None) or getattr(model, "end_of_word_suffix", None):
        return False
    if byte_level and isinstance(model, models.BPE | models.Unigram):
        return all(model.token_to_id(character) is not None for character in ALPHABET)
    if not isinstance(model, models.BPE):
        return False
    if model.byte_fallback and all(model.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)):
        return True
    return model.unk_token is not None and not model.fuse_unk
