"""Interruption of long runs by signals."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol


class Run(Protocol):
    """A run in steps that ends after the current step once `stopping` is set."""

    stopping: bool


@contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """End a run after its current step on SIGINT or SIGTERM; a second signal ends the process immediately."""
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
