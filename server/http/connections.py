"""Connection limits: their number, the time each may keep the server waiting, and eviction in favour of new ones."""

import asyncio
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog

from server.http.incoming import IncomingBodies, Sender

log = structlog.get_logger(__name__)

DEFAULT_CONNECTIONS = 1024
"""Default maximum of connections, if the limit on open files allows it."""
RESERVED_DESCRIPTORS = 64
"""Free file descriptors reserved for the server's own files: models, policies, /proc."""
MAX_UNREAD = 256 << 20
"""Bytes of unread responses allowed over all connections."""
SMALL_RESPONSE = 64 * 1024
"""Bytes of an unread response that a client may take at any speed."""
MAX_READ_LAG = 2.0
"""Seconds behind the minimum rate after which a slow reader may be disconnected to free memory."""
CHECK_PERIOD = 0.25
"""Seconds between two checks of all connections."""


class TooFewDescriptorsError(Exception):
    """The limit on open files leaves too few descriptors for connections."""


class MonitoredConnection(Sender, Protocol):
    """Interface of a connection that `ConnectionWatch` monitors.

    Attributes:
        body_rate: rate at which an incoming body arrives, in bytes per second; 0 if none is incoming.
        unread: bytes of responses that the client has not read yet.
        taken_at: time up to which the client has kept up with the minimum rate.
    """

    unread: int
    taken_at: float

    @property
    def body_rate(self) -> float: ...

    def check(self, now: float) -> None:
        """Disconnect the client if it has kept the server waiting for too long."""

    def end(self) -> None:
        """Close the connection immediately."""

    def make_room(self) -> None:
        """Close the connection in favour of a new one."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of connections; times in seconds.

    Attributes:
        header_timeout: to send the first request after connecting, or the rest of a request's head.
        body_timeout: to send a body, or as much of it as arrives at the minimum rate.
        write_timeout: to read any part of a pending response.
        keep_alive: idle time between requests.
        connections: maximum number.
    """

    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive: float = 75.0
    connections: int = DEFAULT_CONNECTIONS


@dataclass(eq=False)
class ConnectionWatch:
    """Monitors all connections of one server.

    Attributes:
        rejected: callback that counts a refusal by its reason.
        open: all connections.
        owing: connections whose client owes a request or the rest of one, oldest debt first.
        bodies: memory of the incoming bodies.
        truncated: number of responses truncated because the server closed their connection.
    """

    limits: ConnectionLimits
    rejected: Callable[[str], None]
    open: set[MonitoredConnection] = field(default_factory=set)
    owing: dict[MonitoredConnection, None] = field(default_factory=dict)
    bodies: IncomingBodies = field(default_factory=IncomingBodies)
    truncated: int = 0

    def admit(self, connection: MonitoredConnection) -> bool:
        """Register a new connection. False if there is no room for it.

        A full server evicts the client that has owed a request longest. One whose body is arriving is evicted only if
        no other client owes anything.
        """
        self.open.add(connection)
        if len(self.open) > self.limits.connections:
            self.rejected("connections")
            if not self.owing:
                return False
            least = min(self.owing, key=lambda connection: connection.body_rate)
            self.set_owing(least, False)
            least.make_room()
        self.set_owing(connection, True)
        return True

    def set_owing(self, connection: MonitoredConnection, owes: bool) -> None:
        """Note that a client owes a request or the rest of one, or owes nothing any more."""
        if owes:
            self.owing[connection] = None
        else:
            self.owing.pop(connection, None)

    def remove(self, connection: MonitoredConnection) -> None:
        """Unregister a closed connection."""
        self.open.discard(connection)
        self.owing.pop(connection, None)
        self.bodies.set_held(connection, 0)

    async def run(self) -> None:
        """Check all connections periodically. One shared timer costs a request nothing."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(CHECK_PERIOD)
            now = loop.time()
            looks: list[Callable[[float], None]] = [connection.check for connection in self.open]
            looks += [partial(self.bodies.check, patience=self.limits.body_timeout), self._end_unread]
            for look in looks:
                try:
                    look(now)
                except Exception:  # check the other connections all the same
                    log.exception("a connection cannot be watched")

    def _end_unread(self, now: float) -> None:
        """Disconnect the slowest readers while unread responses take too much memory."""
        unread = sum(connection.unread for connection in self.open)
        for connection in sorted(self.open, key=lambda connection: connection.taken_at):
            if unread <= MAX_UNREAD or now - connection.taken_at < MAX_READ_LAG:
                break
            if connection.unread > SMALL_RESPONSE:
                unread -= connection.unread
                self.rejected("slow_reader")
                connection.end()


def check_connections(asked: int | None) -> None:
    """Raise TooFewDescriptorsError if the limit on open files leaves fewer connections than asked for, or none."""
    left = _available_descriptors()
    if left is not None and left < (asked or 1):
        raise TooFewDescriptorsError(
            f"the limit of {_limit()} open files (ulimit -n) leaves {max(0, left)} connections: raise it"
            + (f", or lower this from {asked}" if asked else "")
        )


def connection_limit(asked: int | None) -> int:
    """Maximum number of connections: `asked`, or the default within the limit on open files."""
    left = _available_descriptors()
    return asked or (DEFAULT_CONNECTIONS if left is None else max(1, min(DEFAULT_CONNECTIONS, left)))


def _available_descriptors() -> int | None:
    """Descriptors available to connections; None without a limit."""
    limit = _limit()
    return None if limit == resource.RLIM_INFINITY else limit - _open_files() - RESERVED_DESCRIPTORS


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _open_files() -> int:
    """Number of descriptors that this process has open."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return RESERVED_DESCRIPTORS
