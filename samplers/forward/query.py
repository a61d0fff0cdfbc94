"""The question that a step puts to the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.contract import SamplerError
from samplers.forward.prediction import Prediction
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import NOTHING, StatisticsRequest


@dataclass(frozen=True)
class Query:
    """What a step needs to know: positions of canvases, and what of them.

    Attributes:
        canvases: what the model sees, one row of the forward each.
        spans: what it computes of each.
        row, position: int64 [n], the positions asked for: index into `canvases` and place on that canvas.
        wanted: what to say of each position.
        failed: canvases whose sampler failed when it was asked what it wants, and why; `advance` passes it on.
    """

    canvases: list[Canvas]
    spans: list[ForwardSpan]
    row: Tensor
    position: Tensor
    wanted: StatisticsRequest = NOTHING
    failed: Mapping[int, SamplerError] = field(default_factory=dict)

    def one(self, i: int) -> "Query":
        """What it asks of a single one of its canvases; `row` ascends."""
        start, stop = torch.searchsorted(self.row, torch.tensor([i, i + 1])).tolist()
        row, position = torch.zeros(stop - start, dtype=torch.int64), self.position[start:stop]
        return Query([self.canvases[i]], [self.spans[i]], row, position, self.wanted.part(start, stop))


Predict = Callable[[Query], Prediction]
