"""Tensor tools for rules: the best of each row, leading runs, gaps."""

import math

import torch
from torch import Tensor


def best(score: Tensor, candidate: Tensor, count: Tensor | int) -> Tensor:
    """The `count` candidates of highest score in each row; equal scores go to the lower position.

    Args:
        count: [rows, 1], or one number above 0 for all rows.
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
    if int(extra.max()) > 0:  # of those just as good as the last one the first few go; topk does not promise which
        level = found & (score == least)
        found &= ~level | (level.cumsum(dim=1) <= level.sum(dim=1, keepdim=True) - extra)
    return found


def surest(score: Tensor, candidate: Tensor) -> Tensor:
    """The candidate of highest score in each row, bool [rows, width]; equal scores go to the lower position."""
    place = first_of_largest(_ranked(score, candidate))
    return torch.zeros_like(candidate).scatter_(1, place, True) & candidate


def first_of_largest(score: Tensor) -> Tensor:
    """Column of the largest of each row, of equals the first, int64 [rows, 1]."""
    if score.device.type == "cpu":
        return torch.from_numpy(score.numpy().argmax(axis=1))[:, None]  # a fifth of torch's time
    return (score == score.amax(dim=1, keepdim=True)).byte().argmax(dim=1, keepdim=True)


def _ranked(score: Tensor, candidate: Tensor) -> Tensor:
    """Scores of candidates, and minus infinity elsewhere."""
    if score.device.type == "cpu":
        # A quarter of the time of masked_fill, which branches at every element.
        limit = candidate.view(torch.uint8).to(score.dtype).sub_(0.5).mul_(torch.inf)
        found = score.minimum(limit)
        if not math.isnan(found.amax().item()):
            return found
    return score.masked_fill(~candidate, -torch.inf)


def prefix(passes: Tensor, order: Tensor) -> Tensor:
    """Positions, bool [rows, width], of the leading run of passes in an order, both [rows, width]."""
    leading = passes.int().cumprod(dim=1).bool()
    return torch.zeros_like(leading).scatter(1, order, leading)


def leading_of_gaps(candidate: Tensor, score: Tensor) -> Tensor:
    """The candidate of largest score in each run of neighbouring candidates, the first of equals; [rows, width]."""
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
    """Distance of each position to the nearest marked one, int64 [rows, width]; over 2 ** 40 where none is marked."""
    far = 1 << 41
    position = torch.arange(marked.shape[1], device=marked.device).expand(marked.shape)
    left = position.where(marked, -far).cummax(dim=1).values
    right = position.where(marked, far).flip(1).cummin(dim=1).values.flip(1)
    return torch.minimum(position - left, right - position)
