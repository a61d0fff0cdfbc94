"""Mixture of experts: each token is processed by the few experts its router chose."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from server.models.decoder import GatedMLP


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores of each row, in descending order; ties: lower index first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def mix(experts: Iterable[Callable[[Tensor], Tensor]], x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of each token's expert outputs, in the weights' dtype, [tokens, width].

    Tokens are sorted by expert, so that each expert processes all its tokens at once. The sum runs over a token's
    experts in index order, one by one, so that its rounding depends on that token only.

    Args:
        experts: all experts, each a function from [n, width] to [n, width].
        x: [tokens, width].
        chosen: int64 [tokens, k], distinct indices of each token's experts.
        weight: [tokens, k], weights of these experts.
    """
    tokens, k = chosen.shape
    chosen, by_index = chosen.sort(dim=1)
    weight = weight.gather(1, by_index)
    sorted_experts, order = chosen.flatten().sort(stable=True)
    fed = x[order // k]
    made = torch.empty_like(fed)
    counts = _counts(sorted_experts)
    start = 0
    for index, expert in enumerate(experts):
        if count := counts.get(index):
            made[start : start + count] = expert(fed[start : start + count])
            start += count
    parts = torch.empty_like(made).index_copy_(0, order, made).view(tokens, k, -1)
    total = parts[:, 0].to(weight.dtype) * weight[:, :1]
    for i in range(1, k):
        total = total + parts[:, i].to(weight.dtype) * weight[:, i : i + 1]
    return total


def _counts(ascending: Tensor) -> dict[int, int]:
    """Number of occurrences of each value, with a single copy from the device."""
    values, counts = torch.unique_consecutive(ascending, return_counts=True)
    found: list[list[int]] = torch.stack([values, counts]).tolist()
    return dict(zip(*found, strict=True))


class SoftmaxMixture(nn.Module):
    """Experts of a layer with a router that takes the largest values of a softmax over all experts.

    Args:
        width, inner: sizes of the states and of the experts' hidden layer.
        count, chosen: number of experts, and of experts per token.
        normalised: normalise the weights of the chosen experts to a sum of 1.
        biased: add a bias per expert to the scores, in the choice and in the weights.
    """

    def __init__(
        self, width: int, inner: int, count: int, chosen: int, *, normalised: bool = False, biased: bool = False
    ) -> None:
        super().__init__()
        self.count, self.normalised = chosen, normalised
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(GatedMLP(width, inner) for _ in range(count))
        self.register_buffer("expert_bias", self.gate.weight.new_zeros(count) if biased else None)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).float().softmax(dim=-1)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        chosen = highest(scores, self.count)
        weight = scores.gather(1, chosen)
        if self.normalised:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return mix(self.experts, x, chosen, weight.to(x.dtype))
