"""A transformer block whose norms and gates depend on a condition, and its attention."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policies.network.config import PolicyConfig


class AdaptiveBlock(nn.Module):
    """A DiT block with rotary attention. Each position has one of two conditions; adaptive gates start at 1.

    Inputs that many positions share need to be given once: the block works on lines, and can be told which line each
    position holds.
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

    def forward(
        self,
        x: Tensor,
        which: Tensor,
        conditions: Tensor,
        valid: Tensor | None,
        holds: Tensor | None = None,
        wanted: Tensor | None = None,
        wanted_lines: Tensor | None = None,
        second_only: bool = False,
    ) -> Tensor:
        """The block's output of every position, or of the wanted ones only: [rows, positions, hidden].

        Lines and conditions are numbered through all rows.

        Args:
            x: [rows, lines, hidden].
            which: int64 [rows, lines], the condition of each line.
            conditions: [2 * rows, hidden], two for each row.
            valid: bool [rows, width], positions that exist; None: all do.
            holds: int64 [rows, width], the line of each position; None: each has its own.
            wanted, wanted_lines: int64 [rows, n], positions whose output is needed, and their lines; None: all.
            second_only: outputs are needed of positions of the second condition only; others come out wrong.
        """
        hidden = x.shape[-1]
        scale1, shift1, gate1, scale2, shift2, gate2 = self.condition(conditions).chunk(6, dim=-1)
        h = _adapted(self.attention_norm, x, F.embedding(which, scale1), F.embedding(which, shift1))
        (query, key, value), (query_bias, key_bias, value_bias) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        k, v = F.linear(h, key, key_bias), F.linear(h, value, value_bias)
        if holds is not None:
            k, v = F.embedding(holds, k.flatten(0, 1)), F.embedding(holds, v.flatten(0, 1))
        turns = turns_wanted = rotations(k.shape[1], hidden, self.heads, x.device)
        if wanted is not None and wanted_lines is not None:
            x, h = F.embedding(wanted_lines, x.flatten(0, 1)), F.embedding(wanted_lines, h.flatten(0, 1))
            which, turns_wanted = which.flatten()[wanted_lines], turns[wanted]
        q = rotated(F.linear(h, query, query_bias), turns_wanted)
        mixed = attention(q, rotated(k, turns), v, valid, self.heads)
        if second_only:
            gate1, scale2, shift2, gate2 = (each[1::2, None] for each in (gate1, scale2, shift2, gate2))
        else:
            gate1, scale2, shift2, gate2 = (F.embedding(which, each) for each in (gate1, scale2, shift2, gate2))
        x = torch.addcmul(x, 1 + gate1, self.out(mixed))
        h = _adapted(self.feedforward_norm, x, scale2, shift2)
        out: Tensor = torch.addcmul(x, 1 + gate2, self.down(F.gelu(self.up(h))))
        return out


def _adapted(norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    out: Tensor = torch.addcmul(shift, norm(x), 1 + scale)
    return out


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
    """Neighbouring pairs of numbers turned: [rows, n, hidden] by complex64 [n, hidden / 2] or [rows, n, hidden / 2]."""
    return torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * turns).flatten(-2)
