"""Calls to the processes that run chat templates (`template_process`), with the limits they run under."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from marshal import dumps
from typing import Any

from jinja2 import TemplateSyntaxError

from server.models.text.template_process import ANSWER, CALL, LIMIT, REFUSED, SYNTAX

PROCESSES = 3
"""Templates rendered concurrently; processes start on demand and stay."""
SECONDS = 1.0
"""Processor time of a call, in seconds."""
PATIENCE = 20.0
"""Wall-clock time of a call, in seconds, for busy machines and stuck processes."""
MEMORY, MEMORY_PER_BYTE = 256 << 20, 64
"""Bytes of address space of a process: a fixed amount, and an amount per byte of the call."""
CHARACTERS, CHARACTERS_PER_BYTE = 1_000_000, 8
"""Characters that a template may write: a fixed number, and a number per byte of the call."""

UTF8, MAX_ERROR = 4, 100_000
"""Maximum bytes of a character, and of an error reply."""


class TemplateRefusedError(ValueError):
    """An error raised by the template."""


class TemplateLimitError(ValueError):
    """The template exceeded the limit on time, memory or text that the message names."""


class _KilledError(TemplateLimitError):
    """The process ended within a call, but not by exceeding a limit."""


class _Process:
    """A template process with its connection."""

    def __init__(self) -> None:
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; from server.models.text.template_process import main; main()"
        )
        self._connection, theirs = socket.socketpair()
        with theirs:
            try:
                self._popen = subprocess.Popen(
                    [sys.executable, "-c", program, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    # The environment may contain keys, and templates need none of it.
                    env={name: value for name, value in os.environ.items() if not name.upper().startswith("UNMASK_")},
                    start_new_session=True,  # a terminal's Ctrl-C is for the server
                )
            except BaseException:
                self._connection.close()
                raise

    def call(self, limits: tuple[float, int, int], payload: bytes) -> tuple[bytes, str]:
        """Kind and text of the reply. Raises TemplateLimitError, after which the process is unusable.

        Args:
            limits: seconds, bytes of memory, characters of text.
        """
        try:
            self._connection.settimeout(PATIENCE)
            self._connection.sendall(CALL.pack(*limits, len(payload)))
            self._connection.sendall(payload)
            kind, size = ANSWER.unpack(self._read(ANSWER.size))
            if size > MAX_ERROR + UTF8 * limits[2]:
                raise TemplateLimitError("its answer is too long")
            return kind, self._read(size).decode("utf-8")
        except TimeoutError:
            raise TemplateLimitError(f"it takes more than {PATIENCE:g} s") from None
        except (OSError, EOFError):
            if self._popen.wait(PATIENCE) == -signal.SIGPROF:
                raise TemplateLimitError(f"it takes more than {limits[0]:g} s of processor time") from None
            raise _KilledError("it ends the process that renders it") from None

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            count = self._connection.recv_into(view[got : got + (1 << 20)])
            if not count:
                raise EOFError
            got += count
        return data

    def end(self) -> None:
        self._connection.close()
        self._popen.kill()
        self._popen.wait()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None


class TemplateWorkers:
    """Pool of processes, each with one call at a time. Thread-safe.

    Args:
        most: maximum number of processes.
    """

    def __init__(self, most: int = PROCESSES) -> None:
        self._free = threading.BoundedSemaphore(most)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()

    def compile(self, source: str) -> None:
        """Check that a template compiles. Raises jinja2.TemplateSyntaxError, TemplateLimitError."""
        self._call(source, None)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Render a template. Raises TemplateRefusedError, TemplateLimitError.

        Args:
            variables: plain JSON.
        """
        return self._call(source, dict(variables))

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        with self._lock:
            return sorted(process.pid for process in self._all)

    def end(self) -> None:
        """End all idle processes."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._all -= set(idle)
        for process in idle:
            process.end()

    def _call(self, source: str, variables: dict[str, Any] | None) -> str:
        payload = dumps((source, variables))
        memory = MEMORY + MEMORY_PER_BYTE * len(payload)
        characters = CHARACTERS + CHARACTERS_PER_BYTE * len(payload)
        limits = SECONDS, memory, characters
        with self._free:
            try:
                kind, text = self._ask(limits, payload)
            except _KilledError:  # retry once: the process may have been killed by something else
                kind, text = self._ask(limits, payload)
        if kind == SYNTAX:
            found = json.loads(text)
            raise TemplateSyntaxError(found["message"], found["line"])
        if kind == LIMIT:
            raise TemplateLimitError(text)
        if kind == REFUSED:
            raise TemplateRefusedError(text)
        return text

    def _ask(self, limits: tuple[float, int, int], payload: bytes) -> tuple[bytes, str]:
        process = self._acquire()
        try:
            kind, text = process.call(limits, payload)
        except BaseException:
            self._discard(process)
            raise
        if kind == LIMIT:  # the process may not have released all memory
            self._discard(process)
        else:
            self._release(process)
        return kind, text

    def _acquire(self) -> _Process:
        while idle := self._next_idle():
            if idle.alive:
                return idle
            self._discard(idle)  # killed from outside, e.g. when the system was out of memory
        process = _Process()
        with self._lock:
            self._all.add(process)
        return process

    def _next_idle(self) -> _Process | None:
        with self._lock:
            return self._idle.pop() if self._idle else None

    def _release(self, process: _Process) -> None:
        with self._lock:
            self._idle.append(process)

    def _discard(self, process: _Process) -> None:
        with self._lock:
            self._all.discard(process)
        process.end()


_workers: TemplateWorkers | None = None


def template_workers() -> TemplateWorkers:
    """The pool of this process, shared by all templates."""
    global _workers
    if _workers is None:
        _workers = TemplateWorkers()
    return _workers


def _forget() -> None:
    """Drop the connections in a forked child: they belong to the parent."""
    global _workers
    _workers = None


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _end() -> None:
    if _workers is not None:
        _workers.end()
