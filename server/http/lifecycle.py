"""Lifecycle of the server: listen, answer, drain, stop."""

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
from server.http.connections import ConnectionLimits, ConnectionWatch, connection_limit
from server.http.protocol import Protocol
from server.runtime.allocator import give_back_heap
from server.settings import Settings

log = structlog.get_logger(__name__)


SEND_BUFFER = 256 * 1024
"""Bytes of a response that the system buffers for a slow client; its own default is megabytes."""


def listen(host: str, port: int) -> socket.socket:
    """Open and bind a socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    except ValueError:  # not a possible name, e.g. an empty label or a null character
        raise OSError(errno.EINVAL, "this is no name of a host") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # inherited by connections
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


FAILURE_NOTICE = 2.0
"""Seconds that a server keeps answering after its engine died, so that clients and probes learn of it."""
FINAL_RESPONSES = 1
"""Seconds then left for responses in progress."""
EXIT_TIMEOUT = 5.0
"""Seconds until a process whose engine died or whose drain timed out exits, whatever hangs."""
TRIM_AFTER = 64 << 20
"""Bytes of bodies freed since the last trim after which the heap is trimmed, once no more of them arrive."""
QUIET_TICKS = 30
"""Server ticks without freed bodies before the heap is trimmed."""
POLL_PERIOD = 0.02
"""Seconds between two checks for completion."""


class DrainingServer(uvicorn.Server):
    """Server that drains on a stop signal: running requests finish, new ones get 503.

    A second signal ends the process immediately. If the engine dies, the server stops by itself.

    Attributes:
        drained: False if a response was truncated: the drain timed out, or the client did not read it.
    """

    def __init__(self, app: FastAPI, engine: Engine, settings: Settings) -> None:
        limits = ConnectionLimits(
            settings.header_timeout,
            settings.body_timeout,
            settings.write_timeout,
            settings.keep_alive,
            connection_limit(settings.max_connections),
        )
        watch = ConnectionWatch(limits, engine.metrics.rejected)
        config = uvicorn.Config(
            app,
            http=partial(Protocol, watch=watch),  # type: ignore[arg-type] # any factory of protocols will do
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
        self._truncated_before = 0
        self._freed = (0, 0, 0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the parent's handler: it closes the socket immediately, and ends the process by the signal.
        if self._drain is not None:
            os._exit(1)
        # A fresh context: the signal may arrive within a request, whose id must not be logged with the shutdown.
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit(), context=Context())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch.run())
        if self.started and sockets:  # logged only now, when a client that reads the line can connect
            host, port = sockets[0].getsockname()[:2]
            log.info("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second. True ends the server."""
        self._engine.look_after()
        if self._died is None and self._engine.failure is not None:
            self._died = time.monotonic()
            log.error("the engine died: the server ends, with exit status 1", error=repr(self._engine.failure))
        if self._died is not None and time.monotonic() - self._died > FAILURE_NOTICE:
            self._deadline = time.monotonic() + FINAL_RESPONSES
            return True
        self._give_back()
        return await super().on_tick(counter)

    def _give_back(self) -> None:
        """Trim the heap after long bodies: freed memory otherwise stays with the process for the next forward pass."""
        given, seen, quiet = self._freed
        freed = self._watch.bodies.freed
        quiet = quiet + 1 if freed == seen else 0
        if quiet == QUIET_TICKS and freed - given > TRIM_AFTER:
            asyncio.get_running_loop().run_in_executor(None, give_back_heap)
            given = freed
        self._freed = (given, freed, quiet)

    async def _drain_and_exit(self) -> None:
        self._deadline = time.monotonic() + self._timeout
        self._truncated_before = self._watch.truncated
        self._engine.drain()
        log.info("stopping: running requests may finish", seconds=self._timeout)
        # Nothing here waits for a thread: the requests that are to finish may occupy all of the app's threads.
        asked = set(self.server_state.tasks)
        while not (self._engine.idle and all(task.done() for task in asked)) and self._engine.alive:
            if time.monotonic() > self._deadline:
                self.drained = False
                log.warning("requests were still running when the time for draining was up", flag="--drain-timeout")
                self._engine.end_all()
                self._deadline = time.monotonic() + FINAL_RESPONSES
                break
            await asyncio.sleep(POLL_PERIOD)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Not the parent's shutdown: its cancellation of slow requests is logged as a failure, with exit status 0.
        for server in self.servers:
            server.close()
        for listening in sockets or []:
            listening.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        while (state.connections or state.tasks) and time.monotonic() < self._deadline and not self.force_exit:
            await asyncio.sleep(POLL_PERIOD)
        for left in list(self._watch.open):
            left.end()
        await asyncio.sleep(POLL_PERIOD)
        if self._watch.truncated > self._truncated_before or state.tasks:
            self.drained = False
            log.warning("answers were not sent in full", connections=self._watch.truncated - self._truncated_before)
        self._watching.cancel()


def serve(app: FastAPI, engine: Engine, bound: socket.socket, settings: Settings) -> bool:
    """Serve until a signal asks to stop or the engine dies, then stop the engine.

    Returns True if everything that was running could finish.
    """
    server = DrainingServer(app, engine, settings)
    try:
        server.run(sockets=[bound])
    finally:
        if engine.failure is not None or not server.drained:
            # A broken device, a dead worker process or a text without end can block the rest of the shutdown.
            deadline = threading.Timer(EXIT_TIMEOUT, os._exit, (1,))
            deadline.daemon = True
            deadline.start()
        engine.stop()
    return server.drained and engine.failure is None
