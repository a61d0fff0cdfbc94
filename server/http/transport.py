"""Transport of a connection: flow control with named holds, and counted output."""

import asyncio

from uvicorn.protocols.http.flow_control import FlowControl

STATUS_LINE = b"HTTP/1.1 "
"""Common beginning of all responses, whatever their status."""


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
