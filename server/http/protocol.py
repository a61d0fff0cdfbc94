"""HTTP/1.1 on one connection: uvicorn's protocol with limits on everything a client controls.

Beyond limits, it differs in its treatment of upgrades, half-closed clients and malformed requests.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import (
    BadHeaderError,
    HeadersTooLargeError,
    SlowRequestError,
    TooManyBodiesError,
    TooManyConnectionsError,
)
from server.engine import NotServingError
from server.http.connections import SMALL_RESPONSE, ConnectionWatch
from server.http.progress import MAX_HEAD, MIN_RATE, RequestProgress
from server.http.refusal import head_error, refusal
from server.http.transport import Flow, Output
from server.http.upgrade import head_without_upgrade

PROBE_DELAYS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Seconds between probes of a half-closed connection: one per byte of STATUS_LINE, the first sent immediately."""
MAX_HEADERS = 256
"""Maximum number of headers of a request."""
MAX_PIPELINED = 4
"""Pipelined requests read before the current one is answered."""
PARSE_SLICE = 1024
"""Bytes parsed at a time, so that the number of pipelined requests is checked before many of them are parsed."""
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

    flow: Flow
    url = b""
    _upgrade_head: bytes | None = None
    _current: RequestResponseCycle | None = None
    _ignores_input = False
    _probing: asyncio.TimerHandle | None = None
    _buffer = b""  # received data, ...
    _parsed = 0  # ... parsed up to this offset
    unread = 0
    _leftover_bytes = 0  # bytes received from a refused client
    _close_by: float | None = None  # deadline of a refused client
    _read_by_client = 0  # bytes that the client has read

    def __init__(self, *args: Any, watch: ConnectionWatch, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch
        self._limits = watch.limits
        self._progress = RequestProgress()
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
        nothing = self._progress.in_head or self._ignores_input or self.cycle.response_complete
        self._watch.bodies.set_held(self, 0 if nothing else self._progress.body - len(self.cycle.body))

    def _parse(self) -> None:
        """Parse the received data, up to the limit of pipelined requests."""
        data, end, progress = self._buffer, len(self._buffer), self._progress
        while self._parsed < end and not self._ignores_input:
            if self._pipeline_is_full():
                self.flow.hold("pipeline")
                return
            until = min(end, self._parsed + PARSE_SLICE)
            if progress.in_head:
                if (last := data.find(b"\r\n\r\n", self._parsed, until)) >= 0:
                    until = last + 4
                if not progress.head:
                    self._waiting_since = self.loop.time()
                progress.head += until - self._parsed
                if progress.head > MAX_HEAD:
                    self._refuse_head()
                    return
            else:
                # Bytes known to be body content are parsed in one go.
                until = max(until, min(end, self._parsed + progress.content_left))
                progress.count(until - self._parsed)
            part, self._parsed = data[self._parsed : until], until
            try:
                self._feed(part)
            except httptools.HttpParserError:
                self.send_400_response("this is not HTTP")
                return
            if progress.framing_is_excessive:
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
            self._progress.begin_body(self.headers, self.loop.time(), self._limits.body_timeout)
            super().on_headers_complete()
            self.headers = []  # trailers are not headers of the request
        elif (method := self.parser.get_method()) != b"CONNECT":
            version = self.parser.get_http_version()
            self._upgrade_head = head_without_upgrade(method, self.url, version, self.headers)

    def on_body(self, body: bytes) -> None:
        if self._ignores_input:
            return
        self._progress.add_content(len(body))
        if not self.cycle.response_complete:
            self._progress.extend_deadline(len(body), self.loop.time(), self._limits.body_timeout)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._ignores_input and not self.parser.should_upgrade():
            super().on_message_complete()
            self._progress.end()
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
            if self._progress.in_head and not self._progress.head:
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
        self._reject("headers", head_error(self._progress.in_head, self.url))

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
            self._output.write(refusal(error))
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
            return
        pending = self._buffer or (waiting and self._progress.in_head)
        if not (self._ignores_input or pending or self.transport.is_closing()):
            self._check_reading(now)

    @property
    def body_rate(self) -> float:
        """Rate of the incoming body in bytes per second; 0 if there is none."""
        return self._progress.body_rate

    @property
    def pace(self) -> float:
        """Recent rate of the incoming body while it was read, in bytes per second."""
        return self._progress.pace

    def _check_reading(self, now: float) -> None:
        limits = self._limits
        if self.flow.read_paused:  # reading is paused: the client is not to blame
            self._waiting_since = now
            self._progress.pause(now, limits.body_timeout)
        else:
            self._progress.measure(now)
        waits = now - self._waiting_since
        if self._progress.head and self._progress.in_head:
            if waits > limits.header_timeout:
                seconds = f"{limits.header_timeout:g} s (--header-timeout)"
                self._reject("slow_request", SlowRequestError(f"the request's head took longer than {seconds}"))
        elif not self._progress.in_head:
            if now > self._progress.deadline:
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
        if self._progress.head or not self._progress.in_head:
            self._refuse(TooManyConnectionsError("too many connections are open (--max-connections): try again later"))
        self.transport.close()

    def shutdown(self) -> None:
        """Close the connection on shutdown, after the pending responses."""
        incomplete = not self._progress.in_head and self.cycle.more_body
        if incomplete and not self.pipeline and not self.cycle.response_started:
            self._refuse(NotServingError("the server is shutting down"))
        else:
            super().shutdown()

    def end(self) -> None:
        """Close the connection immediately."""
        running = self._current
        if self.transport.get_write_buffer_size() or (
            running is not None and not running.response_complete and not running.disconnected
        ):
            self._watch.truncated += 1
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
