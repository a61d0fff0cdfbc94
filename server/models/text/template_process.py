"""Process that compiles and renders chat templates, so that a runaway template cannot take the server with it.

The sandbox isolates a template from other data, but does not stop it from computing for ever or filling the memory,
which a single operation can do. The operating system's limits do. This module imports nothing large and serves one
caller, `template_worker`, on a socket until that is closed.

A call is its limits, a length and, marshalled, a template with its variables. A reply is a letter, a length, UTF-8.
"""

import json
import os
import resource
import signal
import socket
import struct
import sys
from functools import cache, lru_cache
from marshal import loads
from typing import Any

from jinja2 import Template, TemplateSyntaxError

from server.models.text.jinja import chat_environment

TEXT, REFUSED, SYNTAX, LIMIT = b"T", b"R", b"S", b"L"
"""Replies: rendered text; the template's refusal; a syntax error (JSON); the limit that was exceeded."""
CALL, ANSWER = struct.Struct("!dQQQ"), struct.Struct("!cQ")
"""Headers of a call (seconds, bytes of memory, characters of text, length) and of a reply."""
MAX_QUOTED = 1000
"""Characters quoted of a template's own error."""
COMPILED_KEPT = 4
"""Number of compiled templates kept."""


def serve(connection: socket.socket) -> None:
    """Answer calls until the caller closes the connection."""
    while (head := _read(connection, CALL.size)) is not None:
        seconds, memory, most, length = CALL.unpack(head)
        _allow(seconds, memory)
        try:
            payload = _read(connection, length)
            if payload is None:
                return
            source, variables = loads(payload)
            kind, text = _answer(source, variables, most)
            data = text.encode("utf-8")
        except MemoryError:
            kind, data = LIMIT, b"it takes too much memory"
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(ANSWER.pack(kind, len(data)))
        connection.sendall(data)


def _allow(seconds: float, memory: int) -> None:
    """Limit memory and processor time from here on; exceeding the time limit kills the process.

    Args:
        memory: bytes, in addition to those of the program itself.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _program_size() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


@cache
def _program_size() -> int:
    """Bytes of address space that the program had at the first call."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:  # not on Linux
        return 0


def _answer(source: str, variables: dict[str, Any] | None, most: int) -> tuple[bytes, str]:
    """Kind and text of the reply: the rendered text, empty if the template is only to be compiled."""
    try:
        template = _compiled(source)
    except TemplateSyntaxError as error:
        return SYNTAX, json.dumps({"line": error.lineno, "message": str(error.message)[:MAX_QUOTED]})
    except MemoryError:
        raise
    except Exception as error:  # nested too deeply for Jinja or Python
        return LIMIT, f"it cannot be compiled: {_summary(error)}"
    if variables is None:
        return TEXT, ""
    try:
        return _rendered(template, variables, most)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: its errors depend on the messages
        return REFUSED, _summary(error)


@lru_cache(COMPILED_KEPT)
def _compiled(source: str) -> Template:
    return chat_environment().from_string(source)


def _rendered(template: Template, variables: dict[str, Any], most: int) -> tuple[bytes, str]:
    """Rendered text, unless it exceeds this many characters."""
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            return LIMIT, f"it writes more than {most} characters"
    text = "".join(pieces)
    # Templates can produce lone surrogates, which are not characters.
    return TEXT, text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _summary(error: Exception) -> str:
    return " ".join(str(error)[:MAX_QUOTED].split()) or type(error).__name__


def _read(connection: socket.socket, size: int) -> bytearray | None:
    """Read exactly `size` bytes; None if the caller closed the connection."""
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if not count:
            return None
        got += count
    return data


def main() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            serve(connection)
        except OSError:
            os._exit(0)  # the caller closed the connection


if __name__ == "__main__":
    main()
