"""A server's life: listen, answer, drain, stop."""

import asyncio
import os
import socket
import time
from contextvars import Context
from functools import partial
from http import HTTPStatus
from types import FrameType

import anyio.to_thread
import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.errors import BadHeaderError, error_response
from server.engine import Engine

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


class Protocol(HttpToolsProtocol):
    """HTTP whose answer to what is no HTTP has our errors' shape too."""

    def send_400_response(self, msg: str) -> None:
        response = error_response(BadHeaderError(msg))
        head = [*response.raw_headers, (b"connection", b"close")]
        lines = [f"HTTP/1.1 400 {HTTPStatus.BAD_REQUEST.phrase}".encode(), *(b": ".join(header) for header in head)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """Asked to stop, it lets running requests finish and answers new ones with 503 until then.

    A second signal ends the process at once.

    Attributes:
        drained: False if the time for draining was up before everything had finished.
    """

    def __init__(self, app: FastAPI, engine: Engine, drain_timeout: float) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config)
        self.drained = True
        self._engine = engine
        self._timeout = drain_timeout
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the parent's: it closes the socket at once, and ends the process by the signal.
        if self._drain is not None:
            os._exit(1)
        # A context of its own: a signal may come in the midst of a request, whose name is no name for this.
        self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit(), context=Context())

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


def serve(app: FastAPI, engine: Engine, bound: socket.socket, drain_timeout: float) -> bool:
    """Serve until a signal says to stop; whether everything that ran then could finish. Stops the engine."""
    server = DrainingServer(app, engine, drain_timeout)
    host, port = bound.getsockname()[:2]
    log.info("serving", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        server.run(sockets=[bound])
    finally:
        if server.drained:
            engine.stop()
    return server.drained
