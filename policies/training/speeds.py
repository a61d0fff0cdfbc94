"""Speeds that stand for a recipe's alphas."""

import torch
from torch import Tensor


def speed_of(alpha: Tensor | float, alphas: tuple[float, ...]) -> Tensor:
    """The speed of one of a recipe's alphas: evenly from 0 for the smallest to 1 for the largest."""
    known = torch.tensor(sorted(set(alphas)))
    return torch.searchsorted(known, torch.as_tensor(alpha)) / max(1, len(known) - 1)
