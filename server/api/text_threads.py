"""Threads in which bodies are parsed and texts become tokens, apart from those of other work."""

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
"""Bytes of a body from which on it counts as long."""
LONG_THREADS, MOST_LONG = max(1, min(4, len(allowed()) // 2)), 64
"""Long bodies that are worked on at once, and that may be there altogether."""
SHORT_THREADS, MOST_SHORT = 4, 2048
"""The same of short ones."""
ANSWER_THREADS = 2
"""Answers that are put together at once."""

T = TypeVar("T")


class Work(StrEnum):
    """Whose code takes most of the time of a piece of work."""

    TEXT = "text"
    """Ours, and libraries'."""
    CHAT = "chat"
    """A chat template's."""
    SAMPLER = "sampler"
    """A third party's sampler's."""


class _Lane:
    """Threads for bodies of one kind, and the line of those who want one."""

    def __init__(self, name: str, threads: int, most: int, full: Callable[[], Exception]) -> None:
        self.threads = ThreadPoolExecutor(threads, name)
        self.line = FairLine(threads, most, full)


class TextThreads:
    """Runs work on texts off the event loop, a bounded amount of it.

    Short bodies do not wait behind long ones, nor anybody's behind all that another client has sent, nor any behind
    chat templates and third parties' samplers, whose code may take any time. Nothing else waits behind any of them:
    draining and loading have threads of their own.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._lanes = {
            (kind, long): _Lane(f"{kind}-{name}", threads, most, self._full)
            for kind in Work
            for long, name, threads, most in (
                (False, "short", SHORT_THREADS, MOST_SHORT),
                (True, "long", LONG_THREADS, MOST_LONG),
            )
        }
        self._answers = ThreadPoolExecutor(ANSWER_THREADS, "text-answers")

    async def run(self, work: Callable[[], T], owner: Owner, size: int, kind: Work = Work.TEXT) -> T:
        """What the work returns, or raises.

        Args:
            owner: who asks for it.
            size: bytes of the request's body.
            kind: whose code takes most of its time.

        Raises QueueFullError where too many are there and others have fewer of them, and for long ones NotServingError
        if the server stops.
        """
        long = size > LONG
        lane = self._lanes[kind, long]

        def unless_stopping() -> T:
            # Long ones that still wait when the server stops would only hold that up.
            if long and not self._engine.accepting:
                raise NotServingError("the server takes no more long texts: it is shutting down, or its engine ended")
            return work()

        turn = await lane.line.enter(owner, size)
        try:
            return await _in_thread(lane.threads, unless_stopping)
        finally:
            lane.line.leave(turn)

    async def finish(self, work: Callable[[], T]) -> T:
        """The same for the answer of a request that has been worked on: it is never refused."""
        return await _in_thread(self._answers, work)

    def _full(self) -> QueueFullError:
        self._metrics.rejected("texts")
        return QueueFullError("too many requests wait to be read: send it again later, or send fewer at a time")


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, copy_context().run, work)
