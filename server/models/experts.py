"""Mixtures of experts: every token goes through the few that its router chose."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from server.models.decoder import GatedMLP


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, the largest first; among equals the lower index, on every device."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def mix(experts: Iterable[Callable[[Tensor], Tensor]], x: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """What each token's experts make of it, weighted and summed in the weights' type, [tokens, width].

    Tokens are sorted by expert, so that each expert computes all of its tokens at once. The sum runs over a token's
    experts in the order of their index, one after the other: how it is rounded depends on nothing but that token.

    Args:
        experts: all of them, each from [n, width] to [n, width].
        x: [tokens, width].
        chosen: int64 [tokens, k], indices of each token's experts, no two alike.
        weight: [tokens, k], theirs.
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
    """How often each value occurs; one copy from the device."""
    values, counts = torch.unique_consecutive(ascending, return_counts=True)
    found: list[list[int]] = torch.stack([values, counts]).tolist()
    return dict(zip(*found, strict=True))


class SoftmaxMixture(nn.Module):
    """The experts of a layer, and a router whose softmax over all of them chooses.

    Args:
        width, inner: of states, and of what is inside an expert.
        count, chosen: experts, and how many of them a token goes through.
        normalised: whether the weights of those sum up to 1.
        biased: whether experts have a bias, which counts in the choice and in the weights.
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
