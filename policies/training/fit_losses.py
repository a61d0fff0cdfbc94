"""Losses of supervised warm starts."""

import torch
import torch.nn.functional as F
from torch import Tensor


def outcome_loss(logits: Tensor, committed: Tensor, run: Tensor, good: Tensor) -> Tensor:
    """Negative log-likelihood of the runs' outcomes, if each commit is harmless with probability sigmoid(logit).

    A run is right if all its commits were harmless (a noisy-and), so no labels of positions are needed.

    Args:
        logits: [n, length].
        committed: bool [n, length].
        run: int64 [n], the run of each line.
        good: bool [runs].
    """
    each = (F.logsigmoid(logits) * committed).sum(dim=1)
    total = torch.zeros(len(good)).index_add(0, run, each).clamp(max=-1e-5)
    return -torch.where(good, total, torch.log(-torch.expm1(total))).mean()


def imitation_loss(logits: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Cross-entropy of candidates to target commits, bool [n, length]."""
    each = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    return each[candidates].mean()
