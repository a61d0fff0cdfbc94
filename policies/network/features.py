"""Features of positions: numbers per position, none of which depends on the batch."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from samplers import Statistic, Step

Feature = Literal["confidence", "doubt", "top", "top_logs", "entropy", "margin", "neighbours", "before", "place"]

SMALLEST = 1e-4
"""Probabilities below this look the same to a policy."""
DECADES = -math.log(SMALLEST) / 2
PLACE_PERIODS = (8.0, 16.0, 64.0, 256.0)


def width(feature: Feature, top: int) -> int:
    """Numbers per position of a feature."""
    match feature:
        case "top":
            return top
        case "top_logs":
            return top - 1
        case "neighbours":
            return 2
        case "place":
            return 2 * len(PLACE_PERIODS)
        case _:
            return 1


def statistics(features: tuple[Feature, ...]) -> frozenset[Statistic]:
    """Statistics that a prediction must hold beside token, confidence and the largest probabilities."""
    wanted = {"entropy": Statistic.ENTROPY, "margin": Statistic.MARGIN}
    return frozenset(wanted[name] for name in features if name in wanted)


def read(step: Step, features: tuple[Feature, ...], columns: Tensor | None = None) -> Tensor:
    """Features side by side, float32 [rows, width, numbers]; zeros where the step knows nothing of a position.

    `confidence` alone is the paper's input (arXiv 2512.09106, section 3.2). `doubt` is how far it is from 1, in logs: a
    linear layer cannot tell .99 from .9999. `top` are the largest probabilities, `top_logs` all but the first in logs;
    `neighbours` the confidences to the left and right; `before` how much is still masked to the left; `place` where
    the position is.

    Args:
        columns: int64 [rows, n], read these columns of the step only: [rows, n, numbers].
    """
    reader = _Reader(step, columns)
    read = torch.cat([_READERS[name](reader) for name in features], dim=-1).float()
    return read.masked_fill_(~reader.known, 0.0)


class _Reader:
    """Columns of a step; values are [rows, n, numbers]."""

    def __init__(self, step: Step, columns: Tensor | None) -> None:
        self.step, self.columns = step, columns
        confidence = self.at(step.confidence)
        self.known = confidence > -torch.inf
        self.confidence = confidence.clamp(min=0.0)

    def at(self, values: Tensor) -> Tensor:
        """Values [rows, width] at the columns, [rows, n, 1]."""
        return (values if self.columns is None else values.gather(1, self.columns)).unsqueeze(-1)

    @cached_property
    def top(self) -> Tensor:
        top = self.step.top
        if top is None:
            raise ValueError("the prediction has no largest probabilities")
        if self.columns is None:
            return top
        return top.gather(1, self.columns[..., None].expand(-1, -1, top.shape[-1]))

    def neighbours(self) -> Tensor:
        around = torch.nn.functional.pad(self.step.confidence, (1, 1)).clamp_(min=0.0)
        return torch.cat([self.at(around[:, :-2]), self.at(around[:, 2:])], dim=-1)

    def before(self) -> Tensor:
        masked = self.step.masked.float()
        return ((self.at(masked.cumsum(dim=1)) - self.at(masked)) / 8).tanh()

    def place(self) -> Tensor:
        rows, width = self.step.masked.shape
        periods = torch.tensor(PLACE_PERIODS, device=self.known.device)
        angle = torch.arange(width, device=periods.device)[:, None] * (2 * math.pi / periods)
        table = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return table.expand(rows, -1, -1) if self.columns is None else table[self.columns]


def _logs(p: Tensor) -> Tensor:
    """Logarithms of probabilities, scaled to -1 ... 1."""
    return p.clamp(min=SMALLEST).log() / DECADES + 1


_READERS: dict[Feature, Callable[[_Reader], Tensor]] = {
    "confidence": lambda reader: reader.confidence,
    "doubt": lambda reader: -_logs(1 - reader.confidence),
    "top": lambda reader: reader.top,
    "top_logs": lambda reader: _logs(reader.top[..., 1:]),
    "entropy": lambda reader: reader.at(reader.step.extra[Statistic.ENTROPY]) / 2,
    "margin": lambda reader: reader.at(reader.step.extra[Statistic.MARGIN]),
    "neighbours": _Reader.neighbours,
    "before": _Reader.before,
    "place": _Reader.place,
}
