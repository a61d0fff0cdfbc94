"""Rewards of finished generations, and advantages within their groups."""

from typing import Literal

import torch
from torch import Tensor

Form = Literal["multiplicative", "additive"]


def reward(
    correct: Tensor, forwards: Tensor, budget: Tensor, alpha: Tensor | float, form: Form = "multiplicative"
) -> Tensor:
    """Reward of each generation, float32 [n].

    Multiplicative: `correct * ((budget - forwards + 1) / budget) ** alpha`, the released code's form of equation 3.1 of
    arXiv 2512.09106, which never makes a right answer worthless. Additive: `correct - alpha * forwards / budget`,
    an ablation of section 4.4: in a group of wrong answers the fastest one is rewarded.

    Args:
        correct: [n], 1 where the answer is right; anything in 0..1 for partly right ones (shaped rewards).
        forwards: int [n], forward passes used; beyond the budget they count as the budget.
        budget: int [n], the length of the generation region.
        alpha: weight of speed, [n] or one number.
    """
    used = torch.minimum(forwards, budget)
    if form == "additive":
        return correct.float() - alpha * used / budget
    return correct.float() * ((budget - used + 1) / budget) ** alpha


def path_likelihood(committed: Tensor, confidence: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean log-probability of the tokens of each generation at the forwards that committed them, [rows].

    A dense reward without labels: the model's own belief in the path taken (SAS, arXiv 2606.23567).

    Args:
        committed: bool [n, length], what each recorded step committed.
        confidence: [n, length], the committed tokens' probabilities.
        row: int64 [n], the generation of each step.
        rows: number of generations.
    """
    logs = confidence.clamp(min=1e-8).log().masked_fill(~committed, 0.0).sum(dim=1)
    total = torch.zeros(rows).index_add(0, row, logs)
    count = torch.zeros(rows).index_add(0, row, committed.sum(dim=1).float())
    return total / count.clamp(min=1.0)


def group_advantage(rewards: Tensor) -> Tensor:
    """Rewards less their group's mean, [groups, members]; not divided by the deviation (arXiv 2512.09106, 3.3)."""
    return rewards - rewards.mean(dim=1, keepdim=True)


class DeviationScale:
    """Running root mean square of the advantages at each alpha, so that no alpha dominates.

    With one policy for many alphas, rewards at large alphas are small, because few forwards are saved per token.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.state: dict[float, float] = {}

    def scale(self, advantage: Tensor, alpha: Tensor) -> Tensor:
        """Divide advantages [groups, members] by the running value of their alpha [groups], which is updated."""
        scaled = advantage.clone()
        for value in sorted(set(alpha.tolist())):
            mine = alpha == value
            now = float(advantage[mine].pow(2).mean().sqrt())
            known = self.state.get(value)
            self.state[value] = now if known is None else self.decay * known + (1 - self.decay) * now
            scaled[mine] = advantage[mine] / max(self.state[value], 1e-3)
        return scaled
