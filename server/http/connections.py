"""Limits of connections: how many, how long each may keep the server waiting, and who has to go for a newcomer."""

import asyncio
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog

from server.http.incoming import Bodies, Sender

log = structlog.get_logger(__name__)

MOST_CONNECTIONS = 1024
"""Connections by default, where the limit on open files allows them."""
RESERVE = 64
"""Descriptors, beyond those that are open, that are left to the server's own files: models, policies, /proc."""
MOST_UNREAD = 256 << 20
"""Bytes of answers, over all connections, that clients have not taken."""
LITTLE = 64 * 1024
"""Bytes of an answer that may wait for a client as slow as it likes."""
SLOW = 2.0
"""Seconds after which a client that does not take enough may go, if it must be."""
PERIOD = 0.25
"""Seconds between two looks at all connections."""


class TooFewDescriptorsError(Exception):
    """The limit on open files leaves too few of them for connections."""


class Watched(Sender, Protocol):
    """A connection, as its watch sees it.

    Attributes:
        worth: how fast what it owes is coming; 0 as long as no body is.
        unread: bytes that its client has not taken.
        taken_at: the time up to which it has taken enough of them.
    """

    unread: int
    taken_at: float

    @property
    def worth(self) -> float: ...

    def check(self, now: float) -> None:
        """End it if it has kept the server waiting for too long."""

    def end(self) -> None:
        """End it at once."""

    def make_room(self) -> None:
        """End it in favour of a newcomer."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Seconds are those that a client may take.

    Attributes:
        header_timeout: to send its first request once it is connected, or the head of a request it has begun.
        body_timeout: to send a body, or as much of it as comes at the slowest rate.
        write_timeout: to take anything of what is there for it.
        keep_alive: between requests.
        connections: how many there may be.
    """

    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive: float = 75.0
    connections: int = MOST_CONNECTIONS


@dataclass(eq=False)
class ConnectionWatch:
    """All connections of one server.

    Attributes:
        rejected: counts a refusal by its reason.
        open: every connection.
        owing: those whose client owes a request or the rest of one, in the order in which they began to.
        bodies: those that are coming in.
        cut: answers that were not sent in full because the server ended their connection.
    """

    limits: ConnectionLimits
    rejected: Callable[[str], None]
    open: set[Watched] = field(default_factory=set)
    owing: dict[Watched, None] = field(default_factory=dict)
    bodies: Bodies = field(default_factory=Bodies)
    cut: int = 0

    def welcome(self, connection: Watched) -> bool:
        """Take a new connection in; whether there is room.

        If need be, it takes the place of the one that has owed a request longest; of those whose bodies come only where
        there are no others.
        """
        self.open.add(connection)
        if len(self.open) > self.limits.connections:
            self.rejected("connections")
            if not self.owing:
                return False
            least = min(self.owing, key=lambda connection: connection.worth)
            self.owes(least, False)
            least.make_room()
        self.owes(connection, True)
        return True

    def owes(self, connection: Watched, owes: bool) -> None:
        """Note whether a client owes something."""
        if owes:
            self.owing[connection] = None
        else:
            self.owing.pop(connection, None)

    def gone(self, connection: Watched) -> None:
        """A connection has ended."""
        self.open.discard(connection)
        self.owing.pop(connection, None)
        self.bodies.holds(connection, 0)

    async def run(self) -> None:
        """Look at all connections again and again. One timer for all costs a request nothing."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(PERIOD)
            now = loop.time()
            looks: list[Callable[[float], None]] = [connection.check for connection in self.open]
            looks += [partial(self.bodies.look, patience=self.limits.body_timeout), self._end_unread]
            for look in looks:
                try:
                    look(now)
                except Exception:  # the others are looked at all the same
                    log.exception("a connection cannot be watched")

    def _end_unread(self, now: float) -> None:
        """End the connections that take their answers most slowly, while there is too much of what nobody takes."""
        unread = sum(connection.unread for connection in self.open)
        for connection in sorted(self.open, key=lambda connection: connection.taken_at):
            if unread <= MOST_UNREAD or now - connection.taken_at < SLOW:
                break
            if connection.unread > LITTLE:
                unread -= connection.unread
                self.rejected("slow_reader")
                connection.end()


def check_connections(asked: int | None) -> None:
    """Raise TooFewDescriptorsError unless the limit on open files allows so many connections, or any by default."""
    left = _left()
    if left is not None and left < (asked or 1):
        raise TooFewDescriptorsError(
            f"the limit of {_limit()} open files (ulimit -n) leaves {max(0, left)} connections: raise it"
            + (f", or lower this from {asked}" if asked else "")
        )


def most_connections(asked: int | None) -> int:
    """How many connections there may be: as asked, else what is usual and the limit on open files leaves."""
    left = _left()
    return asked or (MOST_CONNECTIONS if left is None else max(1, min(MOST_CONNECTIONS, left)))


def _left() -> int | None:
    """Descriptors that are left to connections; None where there is no limit."""
    limit = _limit()
    return None if limit == resource.RLIM_INFINITY else limit - _open_files() - RESERVE


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _open_files() -> int:
    """Descriptors of this process."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return RESERVE
