"""Limits of connections: how many, how long each may keep the server waiting, and who has to go for a newcomer."""

import asyncio
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from server.incoming import Bodies, Sender

log = structlog.get_logger(__name__)

MOST_CONNECTIONS = 1024
"""Connections by default, where the limit on open files allows them."""
RESERVE = 64
"""Descriptors, beyond those that are open, that are left to the server's own files: models, policies, /proc."""
PERIOD = 0.25
"""Seconds between two looks at all connections."""


class TooFewDescriptorsError(Exception):
    """The limit on open files leaves too few of them for connections."""


class Watched(Sender, Protocol):
    """A connection, as its watch sees it."""

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
class Watch:
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
        """Take a new connection in, if need be for the one that has owed a request longest; whether there is room."""
        self.open.add(connection)
        if len(self.open) > self.limits.connections:
            self.rejected("connections")
            if not self.owing:
                return False
            oldest = next(iter(self.owing))
            self.owes(oldest, False)
            oldest.make_room()
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
            for connection in list(self.open):
                try:
                    connection.check(now)
                except Exception:  # the others are looked at all the same
                    log.exception("a connection cannot be watched")
            self.bodies.look(now, self.limits.body_timeout)


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
