"""Generations that join a batch while others are on their way."""

from collections.abc import Sequence
from itertools import count

from samplers.loop.row import Row
from samplers.loop.run import run
from server.engine import Backend


def finish(rows: Sequence[Row], arrivals: Sequence[int], backend: Backend) -> None:
    """Run generations together, each from its own turn on."""
    turns = count()

    def taking() -> list[Row]:
        while not all(row.finished for row in rows):
            turn = next(turns)
            running = [row for row, at in zip(rows, arrivals, strict=False) if at <= turn and not row.finished]
            if running:
                return running
        return []

    for turn in run(taking, backend.predict):
        assert all(event.error is None for _, event in turn)
