"""Threads in which bodies are parsed and texts become tokens, apart from those of other work."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

from server.engine import Engine, NotServingError, QueueFullError
from server.metrics import Metrics
from server.processors import allowed

LONG = 64 * 1024
"""Bytes of a body from which on it counts as long."""
LONG_THREADS, MOST_LONG = max(1, min(4, len(allowed()) // 2)), 64
"""Long bodies that are worked on at once, and that may be there altogether."""
SHORT_THREADS, MOST_SHORT = 4, 2048
"""The same of short ones."""
ANSWER_THREADS = 2
"""Answers that are put together at once."""

T = TypeVar("T")


class _Lane:
    """Threads for bodies of one kind. Belongs to the event loop's thread."""

    def __init__(self, name: str, threads: int, most: int) -> None:
        self.name = name
        self.threads = ThreadPoolExecutor(threads, f"text-{name}")
        self.most = most
        self.inside = 0


class TextThreads:
    """Runs work on texts off the event loop, a bounded amount of it.

    Short bodies do not wait behind long ones, and neither waits behind a third party's code, which may take any time.
    Nothing else waits behind any of them: draining and loading have threads of their own.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._lanes = {
            (foreign, long): _Lane(f"{'foreign-' if foreign else ''}{name}", threads, most)
            for foreign in (False, True)
            for long, name, threads, most in (
                (False, "short", SHORT_THREADS, MOST_SHORT),
                (True, "long", LONG_THREADS, MOST_LONG),
            )
        }
        self._answers = ThreadPoolExecutor(ANSWER_THREADS, "text-answers")

    async def run(self, work: Callable[[], T], size: int, foreign: bool = False) -> T:
        """What the work returns, or raises.

        Args:
            size: bytes of the request's body.
            foreign: whether it runs a third party's code.

        Raises QueueFullError where too many are there already, and for long ones NotServingError if the server stops.
        """
        long = size > LONG
        lane = self._lanes[foreign, long]
        if lane.inside >= lane.most:
            self._metrics.rejected("texts")
            raise QueueFullError(
                f"{lane.inside} requests wait to be read: send it again later, or send fewer at a time"
            )

        def unless_stopping() -> T:
            # Long ones that still wait when the server stops would only hold that up.
            if long and not self._engine.accepting:
                raise NotServingError("the server takes no more long texts: it is shutting down, or its engine ended")
            return work()

        lane.inside += 1
        try:
            return await _in_thread(lane.threads, unless_stopping)
        finally:
            lane.inside -= 1

    async def finish(self, work: Callable[[], T]) -> T:
        """The same for the answer of a request that has been worked on: it is never refused."""
        return await _in_thread(self._answers, work)


async def _in_thread(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, copy_context().run, work)
