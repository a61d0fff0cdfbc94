"""HTTP/1.1 on one connection: uvicorn's protocol with limits on everything a client controls.

Beyond limits, it differs in its treatment of upgrades, half-closed clients and malformed requests.
"""

import asyncio
import math
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import (
    BadHeaderError,
    HeadersTooLargeError,
    SlowRequestError,
    TooManyBodiesError,
    TooManyConnectionsError,
    UrlTooLongError,
    error_response,
)
from server.engine import NotServingError
from server.http.connections import SMALL_RESPONSE, ConnectionWatch

STATUS_LINE = b"HTTP/1.1 "
"""Common beginning of all responses, whatever their status."""
PROBE_DELAYS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between probes of a half-closed connection: one per byte of STATUS_LINE, the first sent immediately."""
MAX_HEAD = 64 * 1024
"""Bytes of a request line with headers, and of a chunked body's framing: chunk extensions and trailers."""
MAX_HEADERS = 256
"""Maximum number of headers of a request."""
MAX_PIPELINED = 4
"""Pipelined requests read before the current one is answered."""
PARSE_SLICE = 1024
"""Bytes parsed at a time, so that the number of pipelined requests is checked before many of them are parsed."""
MAX_FRAMING_RATIO = 16
"""Bytes received per byte of a chunked body, on average at most; chunks of one byte each take six."""
MIN_RATE = 4096
"""Minimum rate of a body or of the reading of a long response, in bytes per second."""
PACE_PERIOD = 2.0
"""Seconds over which the rate of a body is measured."""
LINGER = 1.0
"""Seconds for a refused client to read the error; closing while it still sends would discard the response."""
MAX_LEFTOVER = 1 << 20
"""Bytes that a refused client may still send."""


class Protocol(HttpToolsProtocol):
    """Protocol of one connection.

    Upgrades are never made. A request that offers one (Java's HTTP client offers h2c in every request) is parsed as if
    it did not, so that its body is never taken for another request.

    A client may shut down its sending side once its request is complete, and still gets its response. On the wire this
    looks exactly like a client that has disconnected. Only sending tells them apart: the peer of a closed connection
    rejects data. So once the client's side has ended, the first bytes of the response are sent ahead, one by one: those
    of the status line, which begins all responses; later, in a stream, leading zeros of the next chunk's size.
    A client that still reads gets exactly the response that it would get otherwise. One that disconnects more than a
    few seconds after the end of its side is noticed when the next part of its response is sent.

    Incoming data is parsed in slices, counted before the parser gets them: the parser buffers the beginning of a
    header, however long that grows. While several pipelined requests wait for the current one, the rest is kept
    unparsed and nothing more is read.

    Args:
        watch: registers the connections, and checks each of them periodically.
    """

    flow: "Flow"
    url = b""
    _upgrade_head: bytes | None = None
    _current: RequestResponseCycle | None = None
    _ignores_input = False
    _probing: asyncio.TimerHandle | None = None
    _buffer = b""  # received data, ...
    _parsed = 0  # ... parsed up to this offset
    _in_head = True
    _head_bytes = 0  # bytes of the incoming head
    _framing_bytes = 0  # bytes of a body's framing since the last byte of content
    _received_bytes = 0  # bytes of the incoming body, with its framing
    _content_length = 0  # bytes of the body according to its content-length
    _body_bytes = 0  # bytes of the incoming body
    _body_deadline = math.inf  # deadline for more of the body, or all of it
    _pace_measured = (0.0, 0)  # time of the last measurement of the pace, and the body's bytes then
    pace = math.inf
    unread = 0
    _leftover_bytes = 0  # bytes received from a refused client
    _close_by: float | None = None  # deadline of a refused client
    _read_by_client = 0  # bytes that the client has read

    def __init__(self, *args: Any, watch: ConnectionWatch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch
        self._limits = watch.limits
        self._waiting_since = self.taken_at = self.loop.time()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport)
        self._output = Output(transport)
        if not self._watch.admit(self):
            self._refuse(TooManyConnectionsError("too many connections are open (--max-connections): try again later"))
            transport.close()

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._ignores_input:
            self._leftover_bytes += len(data)
            if self._leftover_bytes > MAX_LEFTOVER:
                self.flow.hold("refused")
            return
        self._buffer = self._buffer[self._parsed :] + data
        self._parsed = 0
        self._parse()
        self._report_body()

    def _report_body(self) -> None:
        """Report the bytes of an incomplete body that the app has not read yet. Unparsed data has its own bound."""
        nothing = self._in_head or self._ignores_input or self.cycle.response_complete
        self._watch.bodies.set_held(self, 0 if nothing else self._body_bytes - len(self.cycle.body))

    def _parse(self) -> None:
        """Parse the received data, up to the limit of pipelined requests."""
        data, end = self._buffer, len(self._buffer)
        while self._parsed < end and not self._ignores_input:
            if self._pipeline_is_full():
                self.flow.hold("pipeline")
                return
            until = min(end, self._parsed + PARSE_SLICE)
            if self._in_head:
                if (last := data.find(b"\r\n\r\n", self._parsed, until)) >= 0:
                    until = last + 4
                if not self._head_bytes:
                    self._waiting_since = self.loop.time()
                self._head_bytes += until - self._parsed
                if self._head_bytes > MAX_HEAD:
                    self._refuse_head()
                    return
            else:
                # Bytes known to be body content are parsed in one go.
                until = max(until, min(end, self._parsed + self._content_length - self._body_bytes))
                self._framing_bytes += until - self._parsed
                self._received_bytes += until - self._parsed
            part, self._parsed = data[self._parsed : until], until
            try:
                self._feed(part)
            except httptools.HttpParserError:
                self.send_400_response("this is not HTTP")
                return
            if self._framing_bytes > MAX_HEAD or self._received_bytes > MAX_HEAD + MAX_FRAMING_RATIO * self._body_bytes:
                self._refuse_head()
            elif self.headers and len(self.headers) > MAX_HEADERS and not self._ignores_input:
                self._refuse_number()
        self._buffer, self._parsed = b"", 0
        self.flow.release("pipeline")

    def _pipeline_is_full(self) -> bool:
        return len(self.pipeline) >= MAX_PIPELINED

    def _feed(self, data: bytes) -> None:
        """Parse a slice. A request that offers an upgrade is parsed again without the offer."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head, self._upgrade_head = self._upgrade_head, None
            if head is None:
                self.send_400_response("CONNECT is not supported: this server is no proxy")
                return
            # The parser skips the body of such a request; the bytes after it would be read as another request.
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head)
            self._feed(data[upgrade.args[0] :])

    def on_headers_complete(self) -> None:
        if self._ignores_input:
            return
        if len(self.headers) > MAX_HEADERS:
            self._refuse_number()
            return
        if not self.parser.should_upgrade():
            self._in_head, self._framing_bytes, self._received_bytes, self._body_bytes = False, 0, 0, 0
            now = self.loop.time()
            length = next((value for name, value in self.headers if name == b"content-length"), b"0")
            self._content_length = int(length) if length.isdigit() and len(length) < 18 else 0
            self._body_deadline, self._pace_measured, self.pace = now + self._limits.body_timeout, (now, 0), math.inf
            super().on_headers_complete()
            self.headers = []  # trailers are not headers of the request
        elif (method := self.parser.get_method()) != b"CONNECT":
            line = b" ".join([method, self.url, f"HTTP/{self.parser.get_http_version()}".encode()])
            lines = [line, *(b": ".join(header) for header in _without_upgrade(self.headers))]
            self._upgrade_head = b"\r\n".join([*lines, b"", b""])

    def on_body(self, body: bytes) -> None:
        if self._ignores_input:
            return
        self._framing_bytes = 0
        self._body_bytes += len(body)
        if not self.cycle.response_complete:
            latest = self.loop.time() + self._limits.body_timeout
            self._body_deadline = min(latest, self._body_deadline + len(body) / MIN_RATE)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._ignores_input and not self.parser.should_upgrade():
            super().on_message_complete()
            self._in_head, self._head_bytes, self._framing_bytes, self._received_bytes = True, 0, 0, 0
            if not self.cycle.response_complete:
                self._watch.set_owing(self, False)
            else:
                self._waiting_since = self.loop.time()

    # Responding

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._current = cycle
        cycle.transport = self._output  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        # Not the parent's: it resumes reading regardless of the pipeline, and sets a timer for each request.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        else:
            if self._in_head and not self._head_bytes:
                self._waiting_since = self.loop.time()
            self._watch.set_owing(self, True)
        if self._buffer:
            self._parse()
        self._report_body()

    def send_400_response(self, msg: str) -> None:
        """Refuse a malformed request with our error body, after the responses to the requests before it."""
        self._refuse(BadHeaderError(msg))

    def _refuse_head(self) -> None:
        """Refuse a request because its head, or its body's framing, is too long."""
        limit = f"longer than {MAX_HEAD} bytes"
        if not self._in_head:
            error: Exception = HeadersTooLargeError(f"the body's trailers or extensions of chunks are {limit}")
        elif len(self.url) > MAX_HEAD // 2:
            error = UrlTooLongError(f"the request's URL and headers are {limit}")
        else:
            error = HeadersTooLargeError(f"the request's headers are {limit}")
        self._reject("headers", error)

    def _refuse_number(self) -> None:
        self._reject("headers", HeadersTooLargeError(f"the request has more than {MAX_HEADERS} headers"))

    def _reject(self, reason: str, error: Exception) -> None:
        self._watch.rejected(reason)
        self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        """Answer the incoming request with an error, after earlier responses, and close the connection."""
        self._watch.set_owing(self, False)
        self._watch.bodies.set_held(self, 0)
        self._buffer, self._parsed = b"", 0
        if self.transport.is_closing():
            return
        if self._stop_reading():
            self.flow.release()  # further data is dropped
            return
        running = self._current
        if running is None or running.response_complete or not running.response_started:
            response = error_response(error)
            head = [*response.raw_headers, (b"connection", b"close")]
            status = STATUS_LINE + f"{response.status_code} {HTTPStatus(response.status_code).phrase}".encode()
            lines = [status, *(b": ".join(header) for header in head)]
            self._output.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        if running is not None and not running.response_complete:
            self._disconnect(running)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._close_by = self.loop.time() + LINGER
        self.flow.release()

    @staticmethod
    def _disconnect(cycle: RequestResponseCycle) -> None:
        """Tell the app that the client of a request has disconnected."""
        cycle.disconnected = True
        cycle.message_event.set()

    # Timeouts

    def check(self, now: float) -> None:
        """Disconnect a client that takes too long to send what it owes or to read its response."""
        waiting = self.transport.get_write_buffer_size()
        taken, self._read_by_client, self.unread = self._read_by_client, self._output.written - waiting, waiting
        if not waiting or (waiting <= SMALL_RESPONSE and self._read_by_client > taken):
            self.taken_at = now
        elif self._read_by_client > taken:
            self.taken_at = min(now, self.taken_at + (self._read_by_client - taken) / MIN_RATE)
        if now - self.taken_at > self._limits.write_timeout:
            self._watch.rejected("slow_reader")
            self.end()
            return
        if self._close_by is not None:
            if now > self._close_by and not waiting:
                self.transport.close()
        elif not (self._ignores_input or self._buffer or (waiting and self._in_head) or self.transport.is_closing()):
            self._check_reading(now)

    @property
    def body_rate(self) -> float:
        """Rate of the incoming body in bytes per second; 0 if there is none."""
        if self._in_head:
            return 0
        return self._body_bytes if self.pace == math.inf else self.pace

    def _check_reading(self, now: float) -> None:
        limits = self._limits
        if self.flow.read_paused:  # reading is paused: the client is not to blame
            self._waiting_since = now
            self._body_deadline = now + limits.body_timeout
            self._pace_measured = (now, self._body_bytes)
        elif now - self._pace_measured[0] >= PACE_PERIOD:
            self.pace, self._pace_measured = (
                (self._body_bytes - self._pace_measured[1]) / (now - self._pace_measured[0]),
                (now, self._body_bytes),
            )
        waits = now - self._waiting_since
        if self._head_bytes and self._in_head:
            if waits > limits.header_timeout:
                seconds = f"{limits.header_timeout:g} s (--header-timeout)"
                self._reject("slow_request", SlowRequestError(f"the request's head took longer than {seconds}"))
        elif not self._in_head:
            if now > self._body_deadline:
                rate = f"{MIN_RATE} bytes a second over {limits.body_timeout:g} s (--body-timeout)"
                self._reject("slow_request", SlowRequestError(f"the request's body came slower than {rate}"))
        elif self.cycle is None:
            if waits > limits.header_timeout:
                self._watch.rejected("slow_request")
                self.transport.close()
        elif self.cycle.response_complete and waits > limits.keep_alive:
            self.transport.close()

    def hold_body(self) -> None:
        """Pause reading the body."""
        self.flow.hold("bodies")

    def read_body(self) -> None:
        """Resume reading the body."""
        self.flow.release("bodies")

    def end_slow_body(self) -> None:
        """Close the connection because its body arrives too slowly while memory is short."""
        self._reject("slow_request", SlowRequestError("the request's body came too slowly for a server this busy"))

    def end_waiting_body(self) -> None:
        """Close the connection because its body has been paused for too long."""
        self._reject("bodies", TooManyBodiesError("too many long bodies are being sent: try again later"))

    def make_room(self) -> None:
        """Close the connection, whose client owes a request, in favour of a new one."""
        if self._head_bytes or not self._in_head:
            self._refuse(TooManyConnectionsError("too many connections are open (--max-connections): try again later"))
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection on shutdown, after the pending responses."""
        if not self._in_head and self.cycle.more_body and not self.pipeline and not self.cycle.response_started:
            self._refuse(NotServingError("the server is shutting down"))
        else:
            super().shutdown()

    def end(self) -> None:
        """Close the connection immediately."""
        running = self._current
        if self.transport.get_write_buffer_size() or (
            running is not None and not running.response_complete and not running.disconnected
        ):
            self._watch.cut += 1
        self.transport.abort()

    # Disconnecting clients

    def eof_received(self) -> bool:  # type: ignore[override]
        """Handle the end of the client's sending side. True keeps the connection until its responses are sent."""
        if self.scheme == "https" or not self._stop_reading():  # TLS connections cannot be half-closed
            return False
        if self._probing is None:
            self._probe(iter(PROBE_DELAYS))
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.remove(self)
        self._buffer, self._parsed = b"", 0
        if self._probing is not None:
            self._probing.cancel()
        if self._current is not None and not self._current.response_complete:
            self._disconnect(self._current)
        super().connection_lost(exc)

    def _stop_reading(self) -> bool:
        """Ignore further input. True if complete requests are still to be answered."""
        self._ignores_input = True
        if self.pipeline and self.pipeline[0][0].more_body:  # the newest, which will never be complete
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._current  # type: ignore[assignment]
        last = self.cycle
        if last is None or last.response_complete or last.more_body:
            return False
        last.keep_alive = False
        return True

    def _probe(self, delays: Iterator[float]) -> None:
        """Send one byte of the next response ahead; if the client has disconnected, that closes the connection."""
        cycle = self._current
        if cycle is None or self.transport.is_closing():
            return
        if not cycle.response_started:
            self._output.begin()
        elif cycle.chunked_encoding and not cycle.response_complete and not self.flow.write_paused:
            self._output.write(b"0")
        if (delay := next(delays, None)) is not None:
            self._probing = self.loop.call_later(delay, self._probe, delays)


class Flow(FlowControl):
    """Flow control with named holds: the reader of a body cannot resume a connection that is on hold."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._holds: set[str] = set()

    def hold(self, why: str) -> None:
        """Pause reading until this reason is released."""
        self._holds.add(why)
        self.pause_reading()

    def release(self, *why: str) -> None:
        """Resume reading if no other reason holds the connection. Without an argument, release all of them."""
        if self._holds:
            self._holds = self._holds.difference(why) if why else set()
            self.resume_reading()

    def resume_reading(self) -> None:
        if not self._holds:
            super().resume_reading()


class Output:
    """Transport that counts the bytes written, and can send the first bytes of the next response ahead of the rest.

    Attributes:
        written: bytes written so far.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = 0
        self.written = 0

    def begin(self) -> None:
        """Send one more byte of the common beginning of all responses."""
        byte = STATUS_LINE[self._sent : self._sent + 1]
        self._sent += len(byte)
        self.written += len(byte)
        self._transport.write(byte)

    def write(self, data: bytes) -> None:
        if self._sent:
            data, self._sent = data[self._sent :], 0
        self.written += len(data)
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Headers of a request without its upgrade offer."""
    for name, value in headers:
        if name in (b"upgrade", b"http2-settings"):
            continue
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings"))
            if not value:
                continue
        yield name, value
