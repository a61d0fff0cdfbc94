"""A server's life: listen, answer, drain, stop."""

import asyncio
import errno
import os
import socket
import threading
import time
from contextvars import Context
from functools import partial
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from server.engine import Engine
from server.http.connections import ConnectionLimits, ConnectionWatch, most_connections
from server.http.protocol import Protocol
from server.runtime.allocator import give_back_heap
from server.settings import Settings

log = structlog.get_logger(__name__)


SEND_BUFFER = 256 * 1024
"""Bytes of an answer that the system keeps for a client that does not take them; by itself it would keep megabytes."""


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    except ValueError:  # what no name can be, such as an empty part or a null character
        raise OSError(errno.EINVAL, "this is no name of a host") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # connections take it over
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


DEATH_NOTICE = 2.0
"""Seconds in which a server whose engine died still answers, so that clients and probes hear of it."""
LAST_ANSWERS = 1
"""Seconds that it then leaves to answers which are on their way."""
LEAVE_WITHIN = 5.0
"""Seconds after which a process whose engine died, or whose time for draining is up, ends, whatever hangs."""
FREED = 64 << 20
"""Bytes of bodies after which the heap's free memory goes back to the system, once no more of them come."""
QUIET = 30
"""Ticks without one of them."""
LOOK = 0.02
"""Seconds between two looks at whether all is done."""


class DrainingServer(uvicorn.Server):
    """Asked to stop, it lets running requests finish and answers new ones with 503 until then.

    A second signal ends the process at once. If the engine dies, it stops by itself.

    Attributes:
        drained: False if an answer was cut: the time for draining was up, or its client did not take it.
    """

    def __init__(self, app: FastAPI, engine: Engine, settings: Settings) -> None:
        limits = ConnectionLimits(
            settings.header_timeout,
            settings.body_timeout,
            settings.write_timeout,
            settings.keep_alive,
            most_connections(settings.max_connections),
        )
        watch = ConnectionWatch(limits, engine.metrics.rejected)
        config = uvicorn.Config(
            app,
            http=partial(Protocol, watch=watch),  # type: ignore[arg-type] # anything that makes protocols will do
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config)
        self.drained = True
        self._watch = watch
        self._engine = engine
        self._timeout = settings.drain_timeout
        self._drain: asyncio.Task[None] | None = None
        self._deadline = 0.0
        self._died: float | None = None
        self._cut_before = 0
        self._freed = (0, 0, 0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the parent's: it closes the socket at once, and ends the process by the signal.
        if self._drain is not None:
            os._exit(1)
        # A context of its own: a signal may come in the midst of a request, whose name is no name for this.
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit(), context=Context())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch.run())
        if self.started and sockets:  # said only now, when a client that reads it can connect
            host, port = sockets[0].getsockname()[:2]
            log.info("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; True ends the server."""
        self._engine.look_after()
        if self._died is None and self._engine.failure is not None:
            self._died = time.monotonic()
            log.error("the engine died: the server ends, with exit status 1", error=repr(self._engine.failure))
        if self._died is not None and time.monotonic() - self._died > DEATH_NOTICE:
            self._deadline = time.monotonic() + LAST_ANSWERS
            return True
        self._give_back()
        return await super().on_tick(counter)

    def _give_back(self) -> None:
        """Give memory back that long bodies took: freed memory otherwise stays, for the next forward."""
        given, seen, quiet = self._freed
        freed = self._watch.bodies.freed
        quiet = quiet + 1 if freed == seen else 0
        if quiet == QUIET and freed - given > FREED:
            asyncio.get_running_loop().run_in_executor(None, give_back_heap)
            given = freed
        self._freed = (given, freed, quiet)

    async def _drain_and_exit(self) -> None:
        self._deadline = time.monotonic() + self._timeout
        self._cut_before = self._watch.cut
        self._engine.drain()
        log.info("stopping: running requests may finish", seconds=self._timeout)
        # Nothing here waits for a thread: all that the app has may be busy with the requests that are to finish.
        asked = set(self.server_state.tasks)
        while not (self._engine.idle and all(task.done() for task in asked)) and self._engine.alive:
            if time.monotonic() > self._deadline:
                self.drained = False
                log.warning("requests were still running when the time for draining was up", flag="--drain-timeout")
                self._engine.end_all()
                self._deadline = time.monotonic() + LAST_ANSWERS
                break
            await asyncio.sleep(LOOK)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Not the parent's, which cancels what takes too long: that is logged as a failure, and the exit status is 0.
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        while (state.connections or state.tasks) and time.monotonic() < self._deadline and not self.force_exit:
            await asyncio.sleep(LOOK)
        for left in list(self._watch.open):
            left.end()
        await asyncio.sleep(LOOK)
        if self._watch.cut > self._cut_before or state.tasks:
            self.drained = False
            log.warning("answers were not sent in full", connections=self._watch.cut - self._cut_before)
        self._watching.cancel()


def serve(app: FastAPI, engine: Engine, bound: socket.socket, settings: Settings) -> bool:
    """Serve until a signal says to stop or the engine dies. Stops the engine.

    Returns whether everything that ran could finish.
    """
    server = DrainingServer(app, engine, settings)
    try:
        server.run(sockets=[bound])
    finally:
        if engine.failure is not None or not server.drained:
            # A broken device, a dead worker process or a text without end can hold up what is still to be done.
            deadline = threading.Timer(LEAVE_WITHIN, os._exit, (1,))
            deadline.daemon = True
            deadline.start()
        engine.stop()
    return server.drained and engine.failure is None
