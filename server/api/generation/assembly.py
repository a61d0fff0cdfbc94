"""Tokens to text that can be sent: whole characters, without any part of a possible stop string."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from server.models.text.codec import TextCodec


class Detokenizer:
    """Incremental decoder; its outputs concatenate to the decoded whole.

    Text is returned once no later token can change it: a character when all its tokens are known. Each call decodes
    only the tokens since the piece before the last, as the tokenizer needs some context (some tokenizers write a word's
    first token differently at the start of a text).

    Attributes:
        waiting: True while the text of the last tokens is uncertain.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._boundaries = codec.boundaries()
        self._tokens: list[int] = []  # from the first one that is decoded again
        self._read = 0  # tokens before this index are sent in full
        self._certain = 0  # the text of tokens before this index is final
        self._sent = 0  # characters sent of the tokens' text
        self.waiting = False

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """Text that is final after these tokens; with `last`, all the rest."""
        for token in tokens:
            if not self._codec.silent(token):
                self._tokens.append(token)
                self.waiting = not self._boundaries.certain_after(token)
                if not self.waiting:
                    self._certain = len(self._tokens)
        if last:
            self._certain, self.waiting = len(self._tokens), False
        if self._certain == self._read:
            return ""
        text = self._codec.decode(self._tokens[: self._certain])
        new = text[self._sent :]
        again = self._codec.decode(self._tokens[self._read : self._certain])
        if again:  # context is not needed once there is some text
            del self._tokens[: self._read]
            self._certain -= self._read
            self._sent = len(again)
        else:
            self._sent = len(text)
        self._read = self._certain
        return new


@dataclass(frozen=True)
class TokenText:
    """Part of a text that belongs to one token.

    Attributes:
        text: text that the token adds; the token's name if it adds none; None if it is part of a character.
        bytes: bytes that the token adds. Concatenated they are the text's, except for invalid bytes, which the text
            shows as U+FFFD.
        start: index of the character at which it begins.
    """

    id: int
    text: str | None
    bytes: bytes
    start: int


class TokenTexts:
    """Splits the text of a growing list of tokens into the parts of each."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._detokenizer = Detokenizer(codec)
        self._group: list[int] = []  # tokens whose text becomes final together
        self._length = 0  # characters before them

    def add(self, tokens: Sequence[int], last: bool = False) -> list[TokenText]:
        """Texts of the tokens that are final after these; with `last`, all the rest."""
        found, text = [], ""
        for token in tokens:
            self._group.append(token)
            text += self._detokenizer.add([token])
            if not self._detokenizer.waiting:
                found += self._split(text)
                text = ""
        if last:
            found += self._split(text + self._detokenizer.add([], last=True))
        return found

    def _split(self, text: str) -> list[TokenText]:
        group, self._group = self._group, []
        own = iter(self._token_bytes([id for id in group if not self._codec.silent(id)], text))
        reader, found = codecs.getincrementaldecoder("utf-8")("replace"), []
        start, self._length = self._length, self._length + len(text)
        for id in group:
            if self._codec.silent(id):
                found.append(TokenText(id, self._codec.token(id), b"", start))
                continue
            data = next(own)
            found.append(TokenText(id, _text(data), data, start))
            # Boundaries are approximate where bytes are invalid or tokens change each other's text.
            start = min(start + len(reader.decode(data)), self._length)
        return found

    def _token_bytes(self, heard: Sequence[int], text: str) -> list[bytes]:
        """Bytes of each token of a group with this text."""
        found = [self._codec.token_bytes(id) for id in heard]
        # Prefer the text, unless it is part of a character: the bytes of a token depend on its place.
        if len(found) == 1 and _text(found[0]) is not None:
            return [text.encode()]
        if len(found) > 1 and self._codec.is_byte(heard[0]):
            count = len(found) - (not self._codec.is_byte(heard[-1]))
            run = b"".join(found[:count])
            read = _text(run)
            if read is not None and (stripped := _stripped_spaces(read, text)):
                found[:count] = _without_first(found[:count], stripped)
                read = read[stripped:]
            if count < len(found):
                found[-1] = text[len(run if read is None else read) :].encode()
        return found


def escaped(data: bytes) -> str:
    """Invalid bytes in the notation of OpenAI's API."""
    return "".join(f"\\x{byte:02x}" for byte in data)


def _stripped_spaces(read: str, text: str) -> int:
    """Number of spaces that a decoder strips from the beginning of a text."""
    spaces = len(read) - len(read.lstrip(" "))
    return next((i for i in range(spaces + 1) if text.startswith(read[i:])), 0)


def _without_first(parts: Sequence[bytes], count: int) -> list[bytes]:
    """Byte strings without their first `count` bytes in all."""
    found = []
    for part in parts:
        found.append(part[count:])
        count = max(0, count - len(part))
    return found


def _text(data: bytes) -> str | None:
    """Decoded bytes; None if they are not whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


class StopStrings:
    """Cuts a growing text before the first stop string.

    Attributes:
        stopped: True once a stop string was found; no further output follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str, last: bool = False) -> str:
        """Text that can be sent; with `last`, nothing is held back."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return held[: min(found)]
        keep = 0 if last else max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a prefix of the stop string."""
    start = max(0, len(text) - len(stop) + 1)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
