"""A prediction by row and window column."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from samplers.forward.prediction import Prediction
from samplers.forward.statistics import Statistic
from samplers.loop.opened import Opened
from samplers.loop.part import Members, Part


@dataclass
class Grid:
    """A prediction by row and window column, [rows, width]; see `Step`."""

    token: Tensor
    confidence: Tensor
    probability: Tensor | None
    _part: Part
    _opened: Opened
    _prediction: Prediction
    _groups: list[tuple[int, int, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, part: Part, opened: Opened, prediction: Prediction) -> "Grid":
        """Spread a prediction over the windows of a part."""
        shape = opened.asked.shape
        token = _spread(prediction.token, opened.flat, shape, -1)
        confidence = _spread(prediction.confidence, opened.flat, shape, -torch.inf)
        probability = None
        if opened.judged is not None:
            probability = confidence
            drawn = _spread(prediction.extra[Statistic.CHOSEN_CONFIDENCE], opened.flat, shape, torch.nan)
            confidence = torch.where(opened.judged[:, None] & opened.asked, drawn, confidence)
        return cls(token, confidence, probability, part, opened, prediction)

    def extra(self, members: Members) -> dict[Statistic, Tensor]:
        """Statistics requested by a group, at its rows."""
        return {name: self._of(members, self._prediction.extra[name]) for name in members.traits.statistics}

    def top(self, members: Members) -> Tensor | None:
        """The largest probabilities at a group's rows, if requested."""
        if self._prediction.top is None or not members.traits.top:
            return None
        return self._of(members, self._prediction.top[:, : members.traits.top])

    def named(self, members: Members, layer: int) -> Tensor | None:
        """Probabilities of the tokens that a rule or modifier named."""
        bounds = self._opened.named.get((members.number, layer))
        if bounds is None or self._prediction.named is None:
            return None
        return self._of(members, self._prediction.named[:, bounds[0] : bounds[1]], 0.0)

    def _of(self, members: Members, values: Tensor, empty: float = torch.nan) -> Tensor:
        """Values of the requested positions at a group's rows, [rows, width, ...]."""
        start, stop, flat = self._group(members)
        shape = (len(members.rows), self._part.width)
        return _spread(values if flat is self._opened.flat else values[start:stop], flat, shape, empty)

    def _group(self, members: Members) -> tuple[int, int, Tensor]:
        """Range (start, stop) of a group's requested positions, and their indices in its windows."""
        flat = self._opened.flat
        if len(self._part.sizes) == 1:
            return 0, 0, flat
        if not self._groups:
            bounds = torch.searchsorted(self._opened.row, self._part.bounds).tolist()
            self._groups = [
                (start, stop, flat[start:stop] - each.start * self._part.width)
                for each, (start, stop) in zip(self._part.members, pairwise(bounds), strict=True)
            ]
        return self._groups[members.number]


def _spread(values: Tensor, flat: Tensor, shape: tuple[int, ...], empty: float) -> Tensor:
    """A grid, [rows, width, ...], with the values at their positions and `empty` elsewhere."""
    rows, width = shape
    more = values.shape[1:]
    out = torch.full((rows * width, *more), empty, dtype=values.dtype, device=values.device)
    if more:
        out[flat] = values
    else:
        out.scatter_(0, flat, values)
    return out.view(rows, width, *more)
