"""Log-likelihoods of a policy's draws. Leading dimensions are free."""

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.learned.policy import STOP, bernoulli_draw, commit_at_least_one, dpls_draw

__all__ = [
    "STOP",
    "bernoulli_draw",
    "bernoulli_entropy",
    "bernoulli_kl",
    "bernoulli_log_prob",
    "commit_at_least_one",
    "dpls_draw",
    "dpls_log_prob",
]

NOTHING = -1e30
"""Stands for minus infinity, whose gradient would be NaN."""


def bernoulli_log_prob(action: Tensor, logits: Tensor, candidates: Tensor, temperature: float = 1.0) -> Tensor:
    """Joint log-probability of independent bits over the candidates, [...] (arXiv 2512.09106, section 3.2)."""
    scaled = logits / temperature
    each = torch.where(action, F.logsigmoid(scaled), F.logsigmoid(-scaled))
    return each.masked_fill(~candidates, 0.0).sum(dim=-1)


def bernoulli_entropy(logits: Tensor, candidates: Tensor) -> Tensor:
    """Entropy of the bits over the candidates in nats, [...]."""
    p = torch.sigmoid(logits)
    each = -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))
    return each.masked_fill(~candidates, 0.0).sum(dim=-1)


def bernoulli_kl(logits: Tensor, reference: Tensor, candidates: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the bits from those of reference logits, in nats, [...]."""
    p = torch.sigmoid(logits)
    yes = F.logsigmoid(logits) - F.logsigmoid(reference)
    no = F.logsigmoid(-logits) - F.logsigmoid(-reference)
    return (p * yes + (1 - p) * no).masked_fill(~candidates, 0.0).sum(dim=-1)


def dpls_log_prob(order: Tensor, logits: Tensor, candidates: Tensor, stop_logit: float = 0.0) -> Tensor:
    """Log-probability of an ordered draw with STOP, [...] (arXiv 2512.09106, appendix E; see `dpls_draw`)."""
    drawn = order >= 0
    picked = order.clamp(min=0)
    taken = torch.zeros_like(order).scatter_add(-1, picked, drawn.long()) > 0
    chosen = logits.gather(-1, picked).masked_fill(~drawn, NOTHING)
    # Each draw chose among the positions drawn then or later, those never drawn and, except for the first draw, STOP.
    later = chosen.flip(-1).logcumsumexp(dim=-1).flip(-1)
    never = logits.masked_fill(~candidates | taken, NOTHING).logsumexp(dim=-1, keepdim=True)
    left = torch.logaddexp(later, never)
    stop = torch.full_like(never, stop_logit)
    choices = torch.cat([left[..., :1], torch.logaddexp(left[..., 1:], stop)], dim=-1)
    each = (chosen - choices).masked_fill(~drawn, 0.0).sum(dim=-1)
    ending = (stop - torch.logaddexp(never, stop))[..., 0]
    return each + ending.masked_fill(~drawn.any(dim=-1), 0.0)
