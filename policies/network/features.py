"""Features of positions: numbers per position, none of which depends on the batch."""

import math
from collections.abc import Callable
from functools import cached_property, lru_cache
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


def read(step: Step, features: tuple[Feature, ...], places: Tensor | None = None) -> Tensor:
    """Features side by side, float32 [rows, width, numbers]; zeros where the step knows nothing of a position.

    `confidence` alone is the paper's input (arXiv 2512.09106, section 3.2). `doubt` is how far it is from 1, in logs: a
    linear layer cannot tell .99 from .9999. `top` are the largest probabilities, `top_logs` all but the first in logs;
    `neighbours` the confidences to the left and right; `before` how much is still masked to the left; `place` where
    the position is.

    Args:
        places: int64 [n], read these positions only, numbered through all rows: [n, numbers].
    """
    reader = _Reader(step, places)
    read = torch.cat([_READERS[name](reader) for name in features], dim=-1).float()
    return read.masked_fill_(~reader.known, 0.0)


class _Reader:
    """Positions of a step; values are [rows, width, numbers], or [n, numbers] of places."""

    def __init__(self, step: Step, places: Tensor | None) -> None:
        self.step, self.places = step, places
        confidence = self.at(step.confidence)
        self.known = confidence > -torch.inf
        self.confidence = confidence.clamp(min=0.0)

    def at(self, values: Tensor) -> Tensor:
        """Values [rows, width] with one more dimension."""
        return (values if self.places is None else values.reshape(-1).index_select(0, self.places)).unsqueeze(-1)

    @cached_property
    def top(self) -> Tensor:
        top = self.step.top
        if top is None:
            raise ValueError("the prediction has no largest probabilities")
        return top if self.places is None else top.flatten(0, 1).index_select(0, self.places)

    def neighbours(self) -> Tensor:
        around = torch.nn.functional.pad(self.step.confidence, (1, 1)).clamp_(min=0.0)
        return torch.cat([self.at(around[:, :-2]), self.at(around[:, 2:])], dim=-1)

    def before(self) -> Tensor:
        masked = self.step.masked.float()
        return ((self.at(masked.cumsum(dim=1)) - self.at(masked)) / 8).tanh()

    def place(self) -> Tensor:
        rows, width = self.step.masked.shape
        table = _waves(width, self.known.device)
        return table.expand(rows, -1, -1) if self.places is None else table.index_select(0, self.places % width)


@lru_cache(maxsize=64)
def _waves(width: int, device: torch.device) -> Tensor:
    """Cosines and sines of positions, [width, numbers]."""
    with torch.inference_mode(False):  # what inference mode makes could not be used in training
        angle = torch.arange(width, device=device)[:, None] * (2 * math.pi / torch.tensor(PLACE_PERIODS, device=device))
        return torch.cat([angle.cos(), angle.sin()], dim=-1)


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
