"""Threads for parsing bodies and tokenizing texts, separate from other work."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from enum import StrEnum
from typing import TypeVar

from server.api.fair_line import FairLine
from server.engine import Engine, NotServingError, Owner, QueueFullError
from server.runtime.metrics import Metrics
from server.runtime.processors import allowed

LONG = 64 * 1024
"""Bytes from which on a body counts as long."""
LONG_THREADS, MAX_LONG = max(1, min(4, len(allowed()) // 2)), 64
"""Long bodies processed concurrently, and their maximum number including queued ones."""
SHORT_THREADS, MAX_SHORT = 4, 2048
"""The same for short bodies."""
ANSWER_THREADS = 2
"""Responses assembled concurrently."""

T = TypeVar("T")


class Work(StrEnum):
    """Origin of the code that takes most of the time."""

    TEXT = "text"
    """Our own and libraries' code."""
    CHAT = "chat"
    """A chat template."""
    SAMPLER = "sampler"
    """A plugin's sampler."""


class _Lane:
    """Thread pool for one kind of body, with its queue."""

    def __init__(self, name: str, threads: int, most: int, full: Callable[[], Exception]) -> None:
        self.threads = ThreadPoolExecutor(threads, name)
        self.line = FairLine(threads, most, full)


class TextThreads:
    """Runs bounded amounts of text processing off the event loop.

    Short bodies do not wait behind long ones, a client's bodies do not wait behind all those of another, and none waits
    behind chat templates or plugins' samplers, which may take any time. Draining and model loading use other threads.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._lanes = {
            (kind, long): _Lane(f"{kind}-{name}", threads, most, self._full)
            for kind in Work
            for long, name, threads, most in (
                (False, "short", SHORT_THREADS, MAX_SHORT),
                (True, "long", LONG_THREADS, MAX_LONG),
            )
        }
        self._answers = ThreadPoolExecutor(ANSWER_THREADS, "text-answers")

    async def run(self, work: Callable[[], T], owner: Owner, size: int, kind: Work = Work.TEXT) -> T:
        """Run work in a thread and return its result, or raise its exception.

        Args:
            owner: owner of the request.
            size: bytes of the request's body.
            kind: origin of the code that takes most of the time.

        Raises QueueFullError if too many requests wait and other owners have fewer of them, and NotServingError for a
        long body if the server stops.
        """
        long = size > LONG
        lane = self._lanes[kind, long]

        def unless_stopping() -> T:
            # Long bodies that still wait when the server stops would only delay the shutdown.
            if long and not self._engine.accepting:
                raise NotServingError("the server takes no more long texts: it is shutting down, or its engine ended")
            return work()

        turn = await lane.line.enter(owner, size)
        try:
            return await _in_thread(lane.threads, unless_stopping)
        finally:
            lane.line.leave(turn)

    async def finish(self, work: Callable[[], T]) -> T:
        """Like `run`, for the response of a request that has been processed: never refused."""
        return await _in_thread(self._answers, work)

    def _full(self) -> QueueFullError:
        self._metrics.rejected("texts")
        return QueueFullError("too many requests wait to be read: send it again later, or send fewer at a time")


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, copy_context().run, work)
