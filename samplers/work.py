"""What a generation can come to cost, known before its first forward."""

from samplers.base import Sampler, SamplerError, SamplerParams
from samplers.canvas import Layout


def work(sampler: Sampler, params: SamplerParams, layout: Layout) -> int:
    """Most tokens that forwards compute for a generation: slots x views x forwards x canvas.

    Raises SamplerError if the sampler cannot tell.
    """
    found = layout.length
    for factor in (sampler.slots(params), sampler.views(params), sampler.most_forwards(params, layout)):
        if not isinstance(factor, int) or factor < 1:
            raise SamplerError("slots, views and most_forwards must be numbers from 1 on")
        found *= factor
    return found
