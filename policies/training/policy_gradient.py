"""Loss of group relative policy optimisation (arXiv 2512.09106, section 3.3 and appendices F and H).

For each trajectory the mean over its steps of the clipped ratio of joint action probabilities times the advantage, then
the mean over trajectories; advantages are not divided by the deviation of their group.
"""

import math

import torch
from torch import Tensor

from policies.network.config import PolicyConfig
from policies.training.log_likelihoods import bernoulli_entropy, bernoulli_kl, bernoulli_log_prob, dpls_log_prob
from policies.training.transitions import Transitions


def log_prob(logits: Tensor, records: Transitions, config: PolicyConfig) -> Tensor:
    """Log-probability of every recorded draw, [n]. Raises ValueError if ordered draws were not recorded."""
    if config.action == "dpls":
        if records.order is None:
            raise ValueError("these records hold no order of draws")
        return dpls_log_prob(records.order, logits, records.candidates, config.stop_logit)
    return bernoulli_log_prob(records.action, logits, records.candidates)


def expert_mixture(log_probs: Tensor, expert: Tensor, group: int, experts: int) -> Tensor:
    """Mix the policy, on expert rows, with a point mass on the expert's action, which bounds their ratio.

    `log(G / (G + E) * pi + 1 / (G + E))` (appendix F).

    Args:
        log_probs: [n].
        expert: bool [n].
        group, experts: numbers of own and of expert rollouts in a group, G and E.
    """
    total = group + experts
    mixed = torch.logaddexp(log_probs + math.log(group / total), torch.full_like(log_probs, -math.log(total)))
    return torch.where(expert, mixed, log_probs)


def clipped_loss(new: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, clip: float) -> Tensor:
    """Loss to minimise, a scalar.

    Args:
        new, old: log-probabilities of each draw under the policy now and when it was drawn, [n].
        advantage: [n], of the step's trajectory.
        weight: [n]; 1 / (steps of its trajectory * trajectories) gives the mean over steps, then trajectories.
        clip: the ratio is clipped to 1 - clip ... 1 + clip.
    """
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(gain * weight).sum()


def regularisation(
    logits: Tensor, reference: Tensor | None, candidates: Tensor, weight: Tensor, entropy: float, kl: float
) -> Tensor:
    """Weighted KL divergence from the reference minus weighted entropy of the bits, to be added to the loss."""
    total = logits.new_zeros(())
    if entropy:
        total = total - entropy * (bernoulli_entropy(logits, candidates) * weight).sum()
    if kl and reference is not None:
        total = total + kl * (bernoulli_kl(logits, reference, candidates) * weight).sum()
    return total
