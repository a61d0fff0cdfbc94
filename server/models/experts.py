"""A mixture of experts: every token goes through the few that its router chose."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


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
