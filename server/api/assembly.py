"""Tokens to text that can be sent: whole characters only, and nothing that may yet turn out to be a stop string."""

from collections.abc import Sequence

from server.models.text import TextCodec

HALF = "\ufffd"
"""How the beginning of a character decodes."""


class Detokenizer:
    """Decodes a growing list of tokens piece by piece; the pieces together are the decoded whole.

    Only the last tokens are decoded again with each new one: enough of them that the tokenizer sees what stands before
    (some write a word's first token differently at the start of a text).
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._tokens: list[int] = []
        self._window = 0  # first token that is decoded again
        self._read = 0  # tokens before this one are sent in full
        self._sent = 0  # characters of the window that are sent

    def add(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that is certain with these tokens; with `last`, all that is left."""
        self._tokens.extend(tokens)
        text = self._codec.decode(self._tokens[self._window :])
        certain = text if last else text.rstrip(HALF)
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if certain == text and new:
            self._window, self._read = self._read, len(self._tokens)
            self._sent = len(self._codec.decode(self._tokens[self._window :]))
        return new


class StopStrings:
    """Cuts a growing text before the first stop string in it.

    Attributes:
        stopped: a stop string was found; nothing more comes out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str, last: bool = False) -> str:
        """What of the text can be sent; with `last`, nothing is held back."""
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
    """Length of the longest end of the text that is the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
