"""Upper bound of a generation's cost, known before its first forward."""

from samplers.loop.hooks import count
from samplers.loop.row import Row

MOST_FORWARDS = 2**31
"""Maximum value of `Sampler.most_forwards`."""


def work(row: Row) -> int:
    """Maximum tokens that forwards compute for a generation: slots x forwards x lengths of all views.

    Raises SamplerError if the sampler fails to report its number of forwards.
    """
    layout = row.canvas.layout
    forwards = count(row.sampler, "most_forwards", 1, MOST_FORWARDS, row.params, layout.twin)
    return len(row.lanes) * forwards * sum(each.length for each in row.layouts)
