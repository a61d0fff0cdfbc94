"""Size and rate of the request that a connection is receiving."""

import math

MAX_HEAD = 64 * 1024
"""Bytes of a request line with headers, and of a chunked body's framing: chunk extensions and trailers."""
MAX_FRAMING_RATIO = 16
"""Bytes received per byte of a chunked body, on average at most; chunks of one byte each take six."""
MIN_RATE = 4096
"""Minimum rate of a body or of the reading of a long response, in bytes per second."""
PACE_PERIOD = 2.0
"""Seconds over which the rate of a body is measured."""


class RequestProgress:
    """Counts the bytes of an incoming request, and measures the rate of its body.

    Attributes:
        in_head: True until the headers are complete.
        head: bytes of the head.
        body: bytes of the body's content.
        deadline: time by which more of the body, or all of it, must arrive.
        pace: recent rate of the body while it was read, in bytes per second; infinite before the first measurement.
    """

    def __init__(self) -> None:
        self.in_head = True
        self.head = self.body = 0
        self.deadline = self.pace = math.inf
        self._content_length = 0
        self._framing = 0  # bytes since the last byte of content
        self._received = 0  # bytes of the body with its framing
        self._measured = (0.0, 0)  # time of the last measurement of the pace, and the body's bytes then

    def begin_body(self, headers: list[tuple[bytes, bytes]], now: float, timeout: float) -> None:
        """Note the end of the head. `timeout`: seconds for the body, unless it keeps arriving at the minimum rate."""
        self.in_head, self._framing, self._received, self.body = False, 0, 0, 0
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        self._content_length = int(length) if length.isdigit() and len(length) < 18 else 0
        self.deadline, self._measured, self.pace = now + timeout, (now, 0), math.inf

    def end(self) -> None:
        """Note the end of the request."""
        self.in_head, self.head, self._framing, self._received = True, 0, 0, 0

    @property
    def content_left(self) -> int:
        """Bytes of content still to come, by the content-length; not positive without one."""
        return self._content_length - self.body

    @property
    def framing_is_excessive(self) -> bool:
        return self._framing > MAX_HEAD or self._received > MAX_HEAD + MAX_FRAMING_RATIO * self.body

    @property
    def body_rate(self) -> float:
        """Rate of the body in bytes per second; 0 in the head, and the bytes so far before the first measurement."""
        if self.in_head:
            return 0
        return self.body if self.pace == math.inf else self.pace

    def count(self, size: int) -> None:
        """Count bytes of the body that are about to be parsed."""
        self._framing += size
        self._received += size

    def add_content(self, size: int) -> None:
        """Count parsed bytes of content."""
        self._framing = 0
        self.body += size

    def extend_deadline(self, size: int, now: float, timeout: float) -> None:
        """Grant the time in which `size` bytes arrive at the minimum rate, up to `timeout` seconds from now."""
        self.deadline = min(now + timeout, self.deadline + size / MIN_RATE)

    def pause(self, now: float, timeout: float) -> None:
        """Restart deadline and measurement: while the connection is not read, the client is not to blame."""
        self.deadline = now + timeout
        self._measured = (now, self.body)

    def measure(self, now: float) -> None:
        """Update the pace if the last measurement is old enough."""
        if now - self._measured[0] >= PACE_PERIOD:
            self.pace = (self.body - self._measured[1]) / (now - self._measured[0])
            self._measured = (now, self.body)
