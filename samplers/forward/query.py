"""The query that a step sends to the model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.forward.prediction import Prediction
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import NOTHING, StatisticsRequest


@dataclass(frozen=True)
class Mixture:
    """Weights that combine the logits of a generation's views into one answer.

    Attributes:
        answer: int64 [n], row of the answer that each requested position contributes to; ascending within a view.
        weight: float32 [n].
        count: number of rows of the answer.
        views: number of views of each generation; their canvases are adjacent in the query.
    """

    answer: Tensor
    weight: Tensor
    count: int
    views: Sequence[int]

    def parts(self, most: int) -> Iterator["MixturePart"]:
        """Parts of the mixture with whole answers in order, of at most `most` requested positions each if possible."""
        order = self.answer.argsort(stable=True)
        answer, weight = self.answer[order], self.weight[order]
        start = 0
        while start < len(answer):
            stop = min(start + most, len(answer))
            if stop < len(answer):
                stop = int(torch.searchsorted(answer, answer[stop]))
            if stop <= start:
                stop = int(torch.searchsorted(answer, answer[start], right=True))
            first, last = int(answer[start]), int(answer[stop - 1]) + 1
            yield MixturePart(order[start:stop], answer[start:stop] - first, weight[start:stop], first, last)
            start = stop


@dataclass(frozen=True)
class MixturePart:
    """Answers `first` to `last` (exclusive) of a mixture.

    Attributes:
        asked: int64 [n], indices of the requested positions that contribute.
        answer: int64 [n], answer that each contributes to, counted from 0.
        weight: float32 [n].
    """

    asked: Tensor
    answer: Tensor
    weight: Tensor
    first: int
    last: int

    def mix(self, logits: Tensor) -> Tensor:
        """Weighted sums, float32 [answers, vocabulary], of logits [n, vocabulary]."""
        answer, weight = (each.to(logits.device, non_blocking=True) for each in (self.answer, self.weight))
        out = logits.new_zeros(self.last - self.first, logits.shape[1], dtype=torch.float32)
        return out.index_add_(0, answer, logits.float() * weight[:, None])


@dataclass(frozen=True)
class Query:
    """The canvases of a forward pass, and the positions and statistics requested of them.

    Attributes:
        canvases: inputs of the model, one row of the forward each.
        spans: positions to compute of each canvas.
        row, position: int64 [n], requested positions: index into `canvases`, ascending, and position on that canvas.
        wanted: statistics of each position, or of each row of the answer if views are mixed.
        mixture: combination of views into answers; None: every generation has a single view.
    """

    canvases: list[Canvas]
    spans: list[ForwardSpan]
    row: Tensor
    position: Tensor
    wanted: StatisticsRequest = NOTHING
    mixture: Mixture | None = None

    @property
    def generations(self) -> int:
        """Number of generations; each may have several canvases."""
        return len(self.canvases) if self.mixture is None else len(self.mixture.views)

    @property
    def answers(self) -> int:
        """Number of rows of the answer."""
        return len(self.position) if self.mixture is None else self.mixture.count

    def part(self, start: int, stop: int) -> "Query":
        """Query of generations `start` to `stop` (exclusive)."""
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
