"""Detection of stop strings while a generation runs."""

from collections.abc import Sequence

from server.api.generation.assembly import Detokenizer, StopStrings
from server.models.text.codec import TextCodec


class TextStop:
    """Finds the token that completes a stop string.

    Tokens are decoded one by one, so that the result does not depend on how many of them were committed together.
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(codec)
        self._stops = StopStrings(stops)
        self._count = 0

    def add(self, tokens: Sequence[int], last: bool = False) -> int | None:
        """Number of tokens up to the one that completes a stop string; None while there is none."""
        for token in tokens:
            self._count += 1
            self._stops.add(self._detokenizer.add([token]))
            if self._stops.stopped:
                return self._count
        if last:
            self._stops.add(self._detokenizer.add([], last=True), last=True)
        return self._count if self._stops.stopped else None
