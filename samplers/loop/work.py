"""What a generation can come to cost, known before its first forward."""

from collections.abc import Sequence
from typing import Any

from samplers.canvas import Layout
from samplers.contract import Modifier, Sampler, SamplerParams
from samplers.loop.guard import MOST_CANVASES, count, views

MOST_FORWARDS = 2**31
"""Forwards that a sampler may say it takes at most."""


def work(
    sampler: Sampler[Any],
    params: SamplerParams,
    layout: Layout,
    modifiers: Sequence[tuple[Modifier[Any], SamplerParams]] = (),
) -> int:
    """Most tokens that forwards compute for a generation: slots x forwards x lengths of all views.

    Raises SamplerError if the sampler cannot tell.
    """
    slots = count(sampler, "slots", 1, MOST_CANVASES, params)
    forwards = count(sampler, "most_forwards", 1, MOST_FORWARDS, params, layout.twin)
    prompts = [view.prompt for view in views(sampler, modifiers)]
    others = [len(prompt) if isinstance(prompt, tuple) else layout.prompt_length for prompt in prompts]
    return slots * forwards * sum(layout.length - layout.prompt_length + prompt for prompt in others)
