"""What a policy reads of a step: numbers per position, none of which depends on the batch."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from samplers import Statistic, Step

Feature = Literal["confidence", "doubt", "top", "top_logs", "entropy", "margin", "neighbours", "before", "place"]

SMALLEST = 1e-4
"""Probabilities below this are all the same to a policy."""
DECADES = -math.log(SMALLEST) / 2
PLACE_PERIODS = (8.0, 16.0, 64.0, 256.0)


def width(feature: Feature, top: int) -> int:
    """How many numbers a feature is."""
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
    """What the model's prediction must hold beside token, confidence and the largest probabilities."""
    wanted = {"entropy": Statistic.ENTROPY, "margin": Statistic.MARGIN}
    return frozenset(wanted[name] for name in features if name in wanted)


def read(step: Step, features: tuple[Feature, ...]) -> Tensor:
    """Features side by side, float32 [rows, width, numbers]; zeros where the step knows nothing of a position.

    `confidence` alone is the paper's input (arXiv 2512.09106, section 3.2). `doubt` is how far it is from 1, in logs: a
    linear layer cannot tell .99 from .9999. `top` are the largest probabilities, `top_logs` all but the first in logs;
    `neighbours` the confidences to the left and right; `before` how much is still masked to the left; `place` where
    the position is.
    """
    known = step.confidence > -torch.inf
    parts = [_READERS[name](step, step.confidence.clamp(min=0.0)) for name in features]
    return torch.cat(parts, dim=-1).float().masked_fill(~known[..., None], 0.0)


def _logs(p: Tensor) -> Tensor:
    """Logarithms of probabilities, brought to -1 ... 1."""
    return p.clamp(min=SMALLEST).log() / DECADES + 1


def _top(step: Step) -> Tensor:
    if step.top is None:
        raise ValueError("the prediction has no largest probabilities")
    return step.top


def _neighbours(confidence: Tensor) -> Tensor:
    none = torch.zeros_like(confidence[:, :1])
    left = torch.cat([none, confidence[:, :-1]], dim=1)
    right = torch.cat([confidence[:, 1:], none], dim=1)
    return torch.stack([left, right], dim=-1)


def _before(step: Step) -> Tensor:
    masked = step.masked.float()
    return ((masked.cumsum(dim=1) - masked) / 8).tanh()[..., None]


def _place(step: Step) -> Tensor:
    rows, length = step.candidate.shape
    position = torch.arange(length, dtype=torch.float32, device=step.candidate.device)
    periods = torch.tensor(PLACE_PERIODS, device=position.device)
    angle = position[:, None] * (2 * math.pi / periods)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).expand(rows, -1, -1)


_READERS: dict[Feature, Callable[[Step, Tensor], Tensor]] = {
    "confidence": lambda step, confidence: confidence[..., None],
    "doubt": lambda step, confidence: -_logs(1 - confidence)[..., None],
    "top": lambda step, confidence: _top(step),
    "top_logs": lambda step, confidence: _logs(_top(step)[..., 1:]),
    "entropy": lambda step, confidence: step.extra[Statistic.ENTROPY][..., None] / 2,
    "margin": lambda step, confidence: step.extra[Statistic.MARGIN][..., None],
    "neighbours": lambda step, confidence: _neighbours(confidence),
    "before": lambda step, confidence: _before(step),
    "place": lambda step, confidence: _place(step),
}
