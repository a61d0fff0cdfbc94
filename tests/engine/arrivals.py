"""Generations that join a batch while others are on their way."""

from collections.abc import Sequence

from samplers.loop.denoising import advance, ask

from samplers.loop.row import Row
from server.engine import Backend


def finish(rows: Sequence[Row], arrivals: Sequence[int], backend: Backend) -> None:
    """Run generations together, each from its own turn on."""
    turn = 0
    while not all(row.finished for row in rows):
        running = [row for row, at in zip(rows, arrivals, strict=False) if at <= turn and not row.finished]
        turn += 1
        if running:
            query = ask(running)
            assert all(outcome.error is None for outcome in advance(running, query, backend.predict(query)))
