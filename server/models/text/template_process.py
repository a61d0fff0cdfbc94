"""The process in which chat templates are compiled and rendered: it may die of them, and the server does not.

The sandbox keeps a template from what is none of its business, but not from computing for ever or filling the memory,
which a single operation can do. Here the system's own limits stop it: this module imports nothing big, knows no model
and serves one caller, `template_worker`, on a socket until that is closed.

A call is its limits, a length and, marshalled, a template with its variables. An answer is a letter, a length, UTF-8.
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
"""Answers: what was rendered; why the template refuses; where it is no template (JSON); which limit it hit."""
CALL, ANSWER = struct.Struct("!dQQQ"), struct.Struct("!cQ")
"""What goes before a call (seconds, bytes of memory, characters of text, length) and before an answer."""
MOST_SAID = 1000
"""Characters of a template's own error that are told."""
KEPT = 4
"""Compiled templates that are kept."""


def serve(connection: socket.socket) -> None:
    """Answer calls until the caller is gone."""
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
    """Limit what comes next: processor time, of which the process dies without any code of its own, and memory.

    Args:
        memory: bytes, beside those of the program itself.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _program_size() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


@cache
def _program_size() -> int:
    """Bytes of address space that the program had when it was first asked for."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except FileNotFoundError:  # not on Linux
        return 0


def _answer(source: str, variables: dict[str, Any] | None, most: int) -> tuple[bytes, str]:
    """What a template writes, nothing where it is only to be compiled."""
    try:
        template = _compiled(source)
    except TemplateSyntaxError as error:
        return SYNTAX, json.dumps({"line": error.lineno, "message": str(error.message)[:MOST_SAID]})
    except MemoryError:
        raise
    except Exception as error:  # nested too deep for Jinja, or for Python
        return LIMIT, f"it cannot be compiled: {_words(error)}"
    if variables is None:
        return TEXT, ""
    try:
        return _rendered(template, variables, most)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: what it raises depends on the messages
        return REFUSED, _words(error)


@lru_cache(KEPT)
def _compiled(source: str) -> Template:
    return chat_environment().from_string(source)


def _rendered(template: Template, variables: dict[str, Any], most: int) -> tuple[bytes, str]:
    """The text, unless it grows beyond this many characters."""
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            return LIMIT, f"it writes more than {most} characters"
    text = "".join(pieces)
    # A template can write half of a surrogate pair, which is no character.
    return TEXT, text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _words(error: Exception) -> str:
    return " ".join(str(error)[:MOST_SAID].split()) or type(error).__name__


def _read(connection: socket.socket, size: int) -> bytearray | None:
    """So many bytes, None if the caller is gone."""
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
            os._exit(0)  # the caller is gone


if __name__ == "__main__":
    main()
