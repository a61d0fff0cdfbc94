"""Tensor tools for rules: top candidates per row, leading runs, gaps."""

import math

import torch
from torch import Tensor

SMALL = 2048
"""Numbers up to which a branch at each takes less time than further operations."""


def best(score: Tensor, candidate: Tensor, count: Tensor | int) -> Tensor:
    """The `count` candidates of highest score in each row. Ties go to the lower position.

    Args:
        count: [rows, 1], or one positive number for all rows.
    """
    most = min(count if isinstance(count, int) else int(count.max()), score.shape[1])
    if most <= 1:
        found = surest(score, candidate)
        return found if isinstance(count, int) else found & (count > 0)
    score = _ranked(score, candidate)
    values = score.topk(most, dim=1).values
    if isinstance(count, int):
        least: Tensor = values[:, -1:]
        count = most
    else:
        least = values.gather(1, (count - 1).clamp(0, most - 1)).masked_fill(count < 1, torch.inf)
    found = candidate & (score >= least)
    extra = found.sum(dim=1, keepdim=True) - count
    if int(extra.max()) > 0:  # ties with the last one go to the lower position; topk does not guarantee that
        level = found & (score == least)
        found &= ~level | (level.cumsum(dim=1) <= level.sum(dim=1, keepdim=True) - extra)
    return found


def surest(score: Tensor, candidate: Tensor) -> Tensor:
    """The candidate of highest score in each row, bool [rows, width]. Ties go to the lower position."""
    place = first_of_largest(_ranked(score, candidate))
    return torch.zeros_like(candidate).scatter_(1, place, True) & candidate


def first_of_largest(score: Tensor) -> Tensor:
    """Column of the largest value of each row, the first in case of ties, int64 [rows, 1]."""
    if score.device.type == "cpu":
        return torch.from_numpy(score.numpy().argmax(axis=1))[:, None]  # takes a fifth of the time that torch does
    return (score == score.amax(dim=1, keepdim=True)).byte().argmax(dim=1, keepdim=True)


def _ranked(score: Tensor, candidate: Tensor) -> Tensor:
    """Scores of candidates; minus infinity elsewhere."""
    if score.device.type == "cpu" and score.numel() > SMALL:
        # A quarter of the time of masked_fill, which branches at every element.
        limit = candidate.view(torch.uint8).to(score.dtype).sub_(0.5).mul_(torch.inf)
        found = score.minimum(limit)
        if not math.isnan(found.amax().item()):
            return found
    return score.masked_fill(~candidate, -torch.inf)


def prefix(passes: Tensor, order: Tensor) -> Tensor:
    """Positions of the leading run of passes, bool [rows, width]; `passes` is sorted by `order`, both [rows, width]."""
    leading = passes.int().cumprod(dim=1).bool()
    return torch.zeros_like(leading).scatter(1, order, leading)


def leading_of_gaps(candidate: Tensor, score: Tensor) -> Tensor:
    """Highest-scoring candidate in each run of adjacent candidates, bool [rows, width]. Ties go to the lower
    position."""
    rows, width = candidate.shape
    before = torch.nn.functional.pad(candidate, (1, 0))[:, :-1]
    gap = (candidate & ~before).cumsum(dim=1) * candidate
    position = torch.arange(width, device=candidate.device).expand(rows, width)
    score = score.masked_fill(~candidate, -torch.inf)
    most = score.new_full((rows, width + 1), -torch.inf).scatter_reduce(1, gap, score, "amax")
    leads = candidate & (score == most.gather(1, gap))
    first = position.new_full((rows, width + 1), width)
    first = first.scatter_reduce(1, gap, position.where(leads, width), "amin")
    return candidate & (position == first.gather(1, gap))


def distance_to(marked: Tensor) -> Tensor:
    """Distance of each position to the nearest marked one, int64 [rows, width]; above 2 ** 40 in rows without any."""
    far = 1 << 41
    position = torch.arange(marked.shape[1], device=marked.device).expand(marked.shape)
    left = position.where(marked, -far).cummax(dim=1).values
    right = position.where(marked, far).flip(1).cummin(dim=1).values.flip(1)
    return torch.minimum(position - left, right - position)
