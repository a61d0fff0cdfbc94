"""A transformer block whose norms and gates depend on a condition, and its attention."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.network.config import PolicyConfig
from policies.network.linear import linear
from policies.network.lines import Lines
from samplers.loop.masks import runs

WORTH_A_CALL = 32
"""Queries of a row whose attention takes about as long as a call does."""


class AdaptiveBlock(nn.Module):
    """A DiT block with rotary attention. Each position has one of two conditions; adaptive gates start at 1.

    Inputs that many positions share need to be given once: see `Lines`.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.condition = nn.Linear(hidden, 6 * hidden)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, config.feedforward), nn.Linear(config.feedforward, hidden)

    def forward(self, x: Tensor, conditions: Tensor, lines: Lines) -> Tensor:
        """The block's output of the wanted lines, [n, hidden], or [rows, width, hidden] of all positions.

        Args:
            x: [lines, hidden], or [rows, width, hidden] if each position has its own line.
            conditions: [2 * rows, hidden], two for each row.
        """
        hidden, width = x.shape[-1], lines.shape[1]
        parts = self.condition(conditions).view(-1, 6, hidden).transpose(0, 1).contiguous()
        scale1, shift1, gate1, scale2, shift2, gate2 = parts.unbind(0)
        h = _adapted(self.attention_norm, x, F.embedding(lines.which, scale1), F.embedding(lines.which, shift1))
        (query, key, value), (query_bias, key_bias, value_bias) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        k, v = linear(h, key, key_bias), linear(h, value, value_bias)
        if lines.holds is not None:
            k, v = F.embedding(lines.holds, k), F.embedding(lines.holds, v)
        k, v = (each.view(*lines.shape, hidden) for each in (k, v))
        if lines.wanted is not None:
            x, h = x.view(-1, hidden)[lines.wanted], h.view(-1, hidden)[lines.wanted]
        q = linear(h, query, query_bias)
        turns = turns_wanted = rotations(width, hidden, self.heads, x.device)
        if lines.columns is not None:
            # Rows of real numbers are picked much faster than rows of complex ones.
            picked = F.embedding(lines.columns, torch.view_as_real(turns).flatten(1))
            turns_wanted = torch.view_as_complex(picked.view(-1, hidden // 2, 2))
        q, k = rotated(q, turns_wanted), rotated(k, turns)
        mixed = attention_of_lines(q, k, v, lines.valid, self.heads, lines.counts)
        x = torch.addcmul(x, lines.spread(1 + gate1), linear(mixed, self.out.weight, self.out.bias))
        h = _adapted(self.feedforward_norm, x, lines.spread(scale2), lines.spread(shift2))
        h = F.gelu(linear(h, self.up.weight, self.up.bias))
        h = linear(h, self.down.weight, self.down.bias)
        out: Tensor = torch.addcmul(x, lines.spread(1 + gate2), h)
        return out


def _adapted(norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out: Tensor = torch.addcmul(shift, norm(x), 1 + scale)
    return out


def attention_of_lines(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int, counts: list[int] | None
) -> Tensor:
    """Attention of [n, hidden] queries, row after row, or of [rows, width, hidden] ones.

    Args:
        k, v, valid: see `attention`.
        counts: number of queries of each row; None: all the width.
    """
    if counts is None:
        return attention(q, k, v, valid, heads)
    rows, most = len(k), max(counts)
    if rows * most > len(q) + rows * WORTH_A_CALL:
        each = [None] * rows if valid is None else valid[:, None].unbind(0)
        parts = zip(q.split_with_sizes(counts), k[:, None].unbind(0), v[:, None].unbind(0), each, strict=True)
        return torch.cat([attention(q[None], k, v, valid, heads)[0] for q, k, v, valid in parts])
    if rows * most == len(q):
        return attention(q.view(rows, most, -1), k, v, valid, heads).flatten(0, 1)
    slots = runs(torch.arange(0, rows * most, most), torch.tensor(counts)).to(q.device)
    padded = q.new_zeros(rows * most, q.shape[1]).index_copy_(0, slots, q)
    return F.embedding(slots, attention(padded.view(rows, most, -1), k, v, valid, heads).flatten(0, 1))


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, heads: int) -> Tensor:
    """Attention of [rows, n, hidden] queries to the valid ones of [rows, width, hidden] keys and values."""
    q, k, v = (each.view(*each.shape[:2], heads, -1).transpose(1, 2) for each in (q, k, v))
    lowest = torch.finfo(q.dtype).min
    bias = None if valid is None else torch.zeros_like(valid, dtype=q.dtype).masked_fill(~valid, lowest)[:, None, None]
    mixed: Tensor
    if torch.is_grad_enabled() and q.requires_grad:
        # Written out: the backward pass of the fused CPU kernel is much slower than this.
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mixed = (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return mixed.transpose(1, 2).flatten(-2)


@lru_cache(maxsize=64)
def rotations(length: int, hidden: int, heads: int, device: torch.device, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of positions from 0, complex64 [length, hidden / 2]: one turn for each pair of numbers."""
    with torch.inference_mode(False):  # what inference mode makes could not be used in training
        size = hidden // heads
        inverse = base ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
        angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inverse
        return torch.complex(angle.cos(), angle.sin()).repeat(1, heads)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring pairs of numbers turned: [rows, n, hidden] or [n, hidden] by complex64 [n, hidden / 2]."""
    return torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * turns).flatten(-2)
