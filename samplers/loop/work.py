"""What a generation can come to cost, known before its first forward."""

from samplers.loop.guard import count
from samplers.loop.row import Row

MOST_FORWARDS = 2**31
"""Forwards that a sampler may say it takes at most."""


def work(row: Row) -> int:
    """Most tokens that forwards compute for a generation: slots x forwards x lengths of all views.

    Raises SamplerError if the sampler cannot tell.
    """
    layout = row.canvas.layout
    forwards = count(row.sampler, "most_forwards", 1, MOST_FORWARDS, row.params, layout.twin)
    return len(row.lanes) * forwards * sum(each.length for each in row.layouts)
