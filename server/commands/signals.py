"""How a long run is interrupted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Run(Protocol):
    """Looks at `stopping` after each of its steps."""

    stopping: bool


@contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """Let SIGINT and SIGTERM end a run after its current step; a second one ends the process at once."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        run.stopping = True
        restore()

    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
