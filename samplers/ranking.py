"""Tensor tools for rules."""

import torch
from torch import Tensor


def best(score: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
    """The `count` [rows, 1] candidates of highest score in each row; equal scores go to the lower position."""
    order = score.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return candidate & (rank < count)


def prefix(passes: Tensor, order: Tensor) -> Tensor:
    """Positions, bool [rows, width], of the leading run of passes in an order, both [rows, width]."""
    leading = passes.int().cumprod(dim=1).bool()
    return torch.zeros_like(leading).scatter(1, order, leading)
