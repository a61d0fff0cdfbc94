"""Bodies that are coming in: how much memory those that are not complete may take, over all connections."""

from typing import Protocol

MOST = 256 << 20
"""Bytes of all bodies that are not complete. Beyond it one of them is read at a time."""
SMALL = 64 * 1024
"""Bytes of a body up to which it is read in any case."""
READ = 256 * 1024
"""Bytes that are read at once from a connection."""
FAST = 64 * 1024
"""Bytes a second; bodies that come more slowly go first when there are too many."""


class Sender(Protocol):
    """A connection on which a body may be coming in.

    Attributes:
        pace: bytes of the body a second, lately, while it was read.
    """

    pace: float

    def hold_body(self) -> None:
        """Read nothing more of it."""

    def read_body(self) -> None:
        """Read on."""

    def end_slow_body(self) -> None:
        """End the connection, since its body comes slowly."""

    def end_waiting_body(self) -> None:
        """End the connection, since its body has waited for too long."""


class Bodies:
    """All bodies that are not complete.

    When they take too much, those that come slowly are ended, slowest first, and the others wait, but for the one that
    has waited longest: so all but the slow ones get through, one after another.

    Attributes:
        total: bytes of all.
        freed: bytes that were held once and are not any more.
        most: bytes that there may be.
    """

    def __init__(self, most: int = MOST) -> None:
        self.total = self.freed = 0
        self.most = most
        self._held: dict[Sender, int] = {}
        self._waiting: dict[Sender, float | None] = {}  # since when, once somebody has looked
        self._first: Sender | None = None  # is read although there are too many

    def holds(self, sender: Sender, size: int) -> None:
        """Note how much of its body is held; 0 once that is complete or nobody wants it any more."""
        held = self._held.get(sender, 0)
        if not (size or held):
            return
        self.total += size - held
        if size:
            self._held[sender] = size
            if self.total > self.most and size > SMALL and sender is not self._first and sender not in self._waiting:
                self._waiting[sender] = None
                sender.hold_body()
            return
        del self._held[sender]
        self.freed += held
        if sender in self._waiting:
            del self._waiting[sender]
            sender.read_body()
        if sender is self._first:
            self._first = None
        self._read_on()

    def look(self, now: float, patience: float) -> None:
        """End what is too slow, or has waited for longer than so many seconds, while there is too much."""
        for sender in sorted(self._held, key=lambda sender: sender.pace):
            if self.total <= self.most or sender.pace >= FAST:
                break
            sender.end_slow_body()
        for sender, since in list(self._waiting.items()):
            if since is None:
                self._waiting[sender] = now
            elif now - since > patience:
                sender.end_waiting_body()
        self._read_on()

    def _read_on(self) -> None:
        """Read on those that have waited longest: as many as there is room for, and one in any case."""
        room = (self.most - self.total) // READ + 1 if self.total <= self.most else 0
        while self._waiting and (room > 0 or self._first is None):
            sender = next(iter(self._waiting))
            del self._waiting[sender]
            if room > 0:
                room -= 1
            else:
                self._first = sender
            sender.read_body()
