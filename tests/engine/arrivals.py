"""Generations that join a batch while others are on their way."""

from collections.abc import Sequence

from samplers.denoising import Denoising, advance, ask
from server.engine import Backend


def finish(rows: Sequence[Denoising], arrivals: Sequence[int], backend: Backend) -> None:
    """Run generations together, each from its own turn on."""
    turn = 0
    while not all(row.finished for row in rows):
        running = [row for row, at in zip(rows, arrivals, strict=False) if at <= turn and not row.finished]
        turn += 1
        if running:
            query = ask(running)
            assert all(outcome.error is None for outcome in advance(running, query, backend.predict(query)))
