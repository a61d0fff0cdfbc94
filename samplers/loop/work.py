"""What a generation can come to cost, known before its first forward."""

from typing import Any

from samplers.canvas import Layout
from samplers.contract import Sampler, SamplerParams
from samplers.loop.hooks import count

MOST_CANVASES = 1024
"""Slots, and views of each, that a sampler may have."""
MOST_FORWARDS = 2**31
"""Forwards that a sampler may say it takes at most."""


def work(sampler: Sampler[Any], params: SamplerParams, layout: Layout) -> int:
    """Most tokens that forwards compute for a generation: slots x views x forwards x canvas.

    Raises SamplerError if the sampler cannot tell.
    """
    slots = count(sampler, "slots", 1, MOST_CANVASES, params)
    views = count(sampler, "views", 1, MOST_CANVASES, params)
    return slots * views * count(sampler, "most_forwards", 1, MOST_FORWARDS, params, layout.twin) * layout.length
