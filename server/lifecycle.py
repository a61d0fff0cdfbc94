"""A server's life: listen, answer, drain, stop."""

import asyncio
import os
import socket
import threading
import time
from contextvars import Context
from functools import partial
from types import FrameType

import anyio.to_thread
import structlog
import uvicorn
from fastapi import FastAPI

from server.engine import Engine
from server.protocol import Protocol
from server.settings import Settings

log = structlog.get_logger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
"""Seconds after which a process whose engine died ends, whatever hangs."""


class DrainingServer(uvicorn.Server):
    """Asked to stop, it lets running requests finish and answers new ones with 503 until then.

    A second signal ends the process at once. If the engine dies, it stops by itself.

    Attributes:
        drained: False if the time for draining was up before everything had finished.
    """

    def __init__(self, app: FastAPI, engine: Engine, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type] # any number of seconds will do
        )
        super().__init__(config)
        self.drained = True
        self._engine = engine
        self._timeout = settings.drain_timeout
        self._drain: asyncio.Task[None] | None = None
        self._died: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the parent's: it closes the socket at once, and ends the process by the signal.
        if self._drain is not None:
            os._exit(1)
        # A context of its own: a signal may come in the midst of a request, whose name is no name for this.
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit(), context=Context())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
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
            self.config.timeout_graceful_shutdown = LAST_ANSWERS
            return True
        return await super().on_tick(counter)

    async def _drain_and_exit(self) -> None:
        deadline = time.monotonic() + self._timeout
        self._engine.drain()
        log.info("stopping: running requests may finish", seconds=self._timeout)
        self.drained = await anyio.to_thread.run_sync(partial(self._engine.wait_idle, self._timeout))
        if not self.drained:
            log.warning("requests were still running when the time for draining was up", flag="--drain-timeout")
            await anyio.to_thread.run_sync(self._engine.stop)
        # What is left to do is to send answers that are complete.
        self.config.timeout_graceful_shutdown = max(1, int(deadline - time.monotonic()))
        self.should_exit = True


def serve(app: FastAPI, engine: Engine, bound: socket.socket, settings: Settings) -> bool:
    """Serve until a signal says to stop or the engine dies. Stops the engine.

    Returns whether everything that ran could finish.
    """
    server = DrainingServer(app, engine, settings)
    try:
        server.run(sockets=[bound])
    finally:
        if engine.failure is not None:
            # A broken device or a dead worker process can hold up everything that is still to be done.
            deadline = threading.Timer(LEAVE_WITHIN, os._exit, (1,))
            deadline.daemon = True
            deadline.start()
        if server.drained:
            engine.stop()
    return server.drained and engine.failure is None
