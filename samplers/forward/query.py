"""The question that a step puts to the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.forward.prediction import Prediction
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import NOTHING, StatisticsRequest


@dataclass(frozen=True)
class Mixture:
    """How the logits of several views of a generation become one.

    Attributes:
        answer: int64 [n], the row of the answer that each asked position counts for; ascending within a view.
        weight: float32 [n].
        count: rows of the answer.
        views: number of views of each generation, whose canvases stand side by side in the query.
    """

    answer: Tensor
    weight: Tensor
    count: int
    views: Sequence[int]

    def mix(self, logits: Tensor, first: int) -> Tensor:
        """Weighted sums, [answers, vocabulary], of logits of the asked positions from `first` on."""
        answer = self.answer[first : first + len(logits)].to(logits.device, non_blocking=True)
        weight = self.weight[first : first + len(logits)].to(logits.device, non_blocking=True)
        rows = answer - answer.min()
        out = logits.new_zeros(int(rows.max()) + 1, logits.shape[1], dtype=torch.float32)
        return out.index_add_(0, rows, logits.float() * weight[:, None])


@dataclass(frozen=True)
class Query:
    """What a step needs to know: positions of canvases, and what of them.

    Attributes:
        canvases: what the model sees, one row of the forward each.
        spans: what it computes of each.
        row, position: int64 [n], the positions asked for: index into `canvases`, ascending, and place on that canvas.
        wanted: what to say of each position, or of each row of the answer where views are mixed.
        mixture: how views become answers; None: every canvas is a generation's only view.
    """

    canvases: list[Canvas]
    spans: list[ForwardSpan]
    row: Tensor
    position: Tensor
    wanted: StatisticsRequest = NOTHING
    mixture: Mixture | None = None

    @property
    def generations(self) -> int:
        """Canvases of generations, however many views each has."""
        return len(self.canvases) if self.mixture is None else len(self.mixture.views)

    def part(self, start: int, stop: int) -> "Query":
        """What is asked of generations `start` to before `stop`."""
        first, last = start, stop
        if self.mixture is not None:
            first, last = sum(self.mixture.views[:start]), sum(self.mixture.views[:stop])
        bounds = torch.tensor([first, last], device=self.row.device)
        begin, end = torch.searchsorted(self.row, bounds).tolist()
        row, position = self.row[begin:end] - first, self.position[begin:end]
        if self.mixture is None:
            wanted, mixture = self.wanted.part(begin, end), None
        else:
            answer = self.mixture.answer[begin:end]
            low, high = (int(answer.min()), int(answer.max()) + 1) if len(answer) else (0, 0)
            wanted = self.wanted.part(low, high)
            views = self.mixture.views[start:stop]
            mixture = Mixture(answer - low, self.mixture.weight[begin:end], high - low, views)
            if max(views) == 1 and bool((mixture.weight == 1).all()):
                mixture = None
        return Query(self.canvases[first:last], self.spans[first:last], row, position, wanted, mixture)


Predict = Callable[[Query], Prediction]
