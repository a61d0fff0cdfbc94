"""Further views of a generation."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.contract import View
from samplers.forward.span import CacheMode
from samplers.loop.cache_plan import CachePlan


@dataclass(eq=False)
class ViewCanvas:
    """A further view of a generation, with its cache plan."""

    canvas: Canvas
    weight: float
    plan: CachePlan

    @classmethod
    def of(cls, view: View, canvas: Canvas, given: Tensor, mask_id: int, cache: CacheMode) -> "ViewCanvas":
        """The view of a canvas, in its own tensors."""
        layout, tokens = canvas.layout, canvas.tokens.clone()
        if view.prompt == "masked":
            tokens[: layout.prompt_length] = mask_id
            tokens[layout.prompt_length + layout.gen_length :] = mask_id
        elif view.prompt is not None:
            tokens = torch.cat([tokens.new_tensor(view.prompt), tokens[layout.prompt_length :]])
            layout = replace(layout, prompt_length=len(view.prompt))
        return cls(Canvas(layout, tokens, canvas.masked), view.weight, CachePlan(cache))
