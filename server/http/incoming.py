"""Memory limit of request bodies that are still incoming, over all connections."""

from typing import Protocol

MAX_INCOMPLETE = 256 << 20
"""Bytes of all incomplete bodies. Beyond it, bodies are read one at a time."""
SMALL_BODY = 64 * 1024
"""Bytes up to which a body is read in any case."""
READ_SIZE = 256 * 1024
"""Bytes read from a connection at a time."""
MIN_PACE = 64 * 1024
"""Bytes per second below which a body may be dropped when memory is short, slowest first."""


class Sender(Protocol):
    """Interface of a connection that may have an incoming body.

    Attributes:
        pace: recent rate of the body while it was read, in bytes per second.
    """

    @property
    def pace(self) -> float: ...

    def hold_body(self) -> None:
        """Pause reading the body."""

    def read_body(self) -> None:
        """Resume reading the body."""

    def end_slow_body(self) -> None:
        """Close the connection because its body arrives too slowly."""

    def end_waiting_body(self) -> None:
        """Close the connection because its body has been paused for too long."""


class IncomingBodies:
    """All incomplete bodies.

    Over the limit, slow senders are disconnected, slowest first, and the other bodies are paused, except for the one
    that has waited longest: so every body that is not slow gets through, one after another.

    Attributes:
        total: bytes held now.
        freed: bytes held earlier and released since.
        max_total: limit of `total`.
    """

    def __init__(self, max_total: int = MAX_INCOMPLETE) -> None:
        self.total = self.freed = 0
        self.max_total = max_total
        self._held: dict[Sender, int] = {}
        self._waiting: dict[Sender, float | None] = {}  # time of the first check that found it paused
        self._exempt: Sender | None = None  # read although the limit is exceeded

    def set_held(self, sender: Sender, size: int) -> None:
        """Note how many bytes of its body are held; 0 once the body is complete or no longer wanted."""
        held = self._held.get(sender, 0)
        if not (size or held):
            return
        self.total += size - held
        if size:
            self._held[sender] = size
            over_limit = self.total > self.max_total
            if over_limit and size > SMALL_BODY and sender is not self._exempt and sender not in self._waiting:
                self._waiting[sender] = None
                sender.hold_body()
            return
        del self._held[sender]
        self.freed += held
        if sender in self._waiting:
            del self._waiting[sender]
            sender.read_body()
        if sender is self._exempt:
            self._exempt = None
        self._read_on()

    def check(self, now: float, patience: float) -> None:
        """Over the limit, end bodies that are slow. End those that have been paused for over `patience` seconds."""
        for sender in sorted(self._held, key=lambda sender: sender.pace):
            if self.total <= self.max_total or sender.pace >= MIN_PACE:
                break
            sender.end_slow_body()
        for sender, since in list(self._waiting.items()):
            if since is None:
                self._waiting[sender] = now
            elif now - since > patience:
                sender.end_waiting_body()
        self._read_on()

    def _read_on(self) -> None:
        """Resume the bodies that have waited longest: as many as fit, and at least one."""
        room = (self.max_total - self.total) // READ_SIZE + 1 if self.total <= self.max_total else 0
        while self._waiting and (room > 0 or self._exempt is None):
            sender = next(iter(self._waiting))
            del self._waiting[sender]
            if room > 0:
                room -= 1
            else:
                self._exempt = sender
            sender.read_body()
