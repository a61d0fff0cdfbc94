"""HTTP/1.1 on one connection: uvicorn's protocol, apart from upgrades, half-closed clients and what is no request."""

import asyncio
from collections.abc import Iterator
from http import HTTPStatus

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import BadHeaderError, error_response

STATUS_LINE = b"HTTP/1.1 "
"""How every answer begins, whatever its status."""
PROBE_DELAYS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between the probes of a half-closed connection: one for each byte of STATUS_LINE, the first goes at once."""


class Protocol(HttpToolsProtocol):
    """One connection.

    Upgrades are never made, so a request that offers one (Java's HTTP client offers h2c in every one) is read as if it
    did not: its body is a body, never another request.

    A client may shut its sending side down once its request is complete, and still gets its answer. On the wire this
    looks just like a client that is gone. Only sending tells the two apart: a client that is gone refuses what it gets.
    So from the moment when a client's side ends, the first bytes of the answer go out one by one ahead of the others:
    of the status line, which begins the same whatever the answer; later, in a stream, leading zeros of the next chunk's
    size. A client that still reads gets exactly the answer that it would get otherwise. One that goes more than some
    seconds after its side has ended is noticed when the next part of its answer is sent.
    """

    _upgrade_head: bytes | None = None
    _running: RequestResponseCycle | None = None
    _deaf = False
    _begun: "_Begun | None" = None
    _probing: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("this is not HTTP")

    def _feed(self, data: bytes) -> None:
        """Parse what came in, and a request that offers an upgrade once more without the offer."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head, self._upgrade_head = self._upgrade_head, None
            if head is None:
                self.send_400_response("CONNECT is not supported: this server is no proxy")
                return
            # The parser skips the body of such a request, and what comes after it would be read as a request.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head)
            self._feed(data[upgrade.args[0] :])

    def on_headers_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            self.headers = []  # trailers are no headers of the request
        elif (method := self.parser.get_method()) != b"CONNECT":
            line = b" ".join([method, self.url, f"HTTP/{self.parser.get_http_version()}".encode()])
            lines = [line, *(b": ".join(header) for header in _without_upgrade(self.headers))]
            self._upgrade_head = b"\r\n".join([*lines, b"", b""])

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, in our errors' shape, after the answers to the requests before it."""
        if self._answers_are_due():
            return
        if self._running is None or self._running.response_complete or not self._running.response_started:
            response = error_response(BadHeaderError(msg))
            head = [*response.raw_headers, (b"connection", b"close")]
            status = STATUS_LINE + f"400 {HTTPStatus.BAD_REQUEST.phrase}".encode()
            lines = [status, *(b": ".join(header) for header in head)]
            self.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. True keeps the connection until its answers are sent."""
        if self.scheme == "https" or not self._answers_are_due():  # TLS has no connections that are half closed
            return False
        if self._probing is None:
            self._probe(iter(PROBE_DELAYS))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._probing is not None:
            self._probing.cancel()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def _answers_are_due(self) -> bool:
        """Take nothing more from the client; whether it sent whole requests that have no answer yet."""
        self._deaf = True
        if self.pipeline and self.pipeline[0][0].more_body:  # the newest, which will never be complete
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._running  # type: ignore[assignment]
        last = self.cycle
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False
        return True

    def _probe(self, delays: Iterator[float]) -> None:
        """Send a byte of the answer that comes next; where the client is gone, that ends the connection."""
        cycle = self._running
        if cycle is None or self.transport.is_closing():
            return
        if not cycle.response_started:
            if self._begun is None:
                self._begun = _Begun(self.transport)
            cycle.transport = self._begun  # type: ignore[assignment]
            self._begun.begin()
        elif cycle.chunked_encoding and not cycle.response_complete and not self.flow.write_paused:
            self.transport.write(b"0")
        if (delay := next(delays, None)) is not None:
            self._probing = self.loop.call_later(delay, self._probe, delays)


class _Begun:
    """A transport on which the first bytes of the next answer are sent before the rest is known."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0

    def begin(self) -> None:
        """Send one byte more of what every answer begins with."""
        self._transport.write(STATUS_LINE[self._sent : self._sent + 1])
        self._sent = min(self._sent + 1, len(STATUS_LINE))

    def write(self, data: bytes) -> None:
        self._transport.write(data[self._sent :])
        self._sent = 0

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """The headers of a request that offers no upgrade."""
    for name, value in headers:
        if name in (b"upgrade", b"http2-settings"):
            continue
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings"))
            if not value:
                continue
        yield name, value
