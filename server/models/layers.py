"""Layers shared by the model families."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in float32, cast back, then multiplied by the weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x).to(x.dtype)

    def normed(self, x: Tensor) -> Tensor:
        """Normed states before the multiplication by the weight, float32."""
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class WideRMSNorm(RMSNorm):
    """Root-mean-square norm in float32 up to and including the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normed(x) * self.weight.float()).to(x.dtype)


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, float32 [length, head_dim], for rotate-half position embedding."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [..., length, head_dim] by position in the tables' dtype, and cast back.

    Tables narrower than head_dim rotate the first dimensions only.
    """
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([rotate(x[..., :size], cos, sin), x[..., size:]], dim=-1)
    wide = x.to(cos.dtype)
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, computed in place in `gate` during inference."""
    return F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate, inplace=True).mul_(up)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape [..., heads * head_dim] to [..., heads, head_dim]; works without tokens too."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


class RotaryTables:
    """Cosine and sine tables, float32 [at least the requested length, 1, size], built on first use.

    Args:
        size: number of rotated dimensions of a head.
        reach: minimum number of positions to build.
    """

    def __init__(self, size: int, theta: float, reach: int) -> None:
        self._size, self._theta, self._reach = size, theta, reach
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._tables is None or self._tables[0].shape[0] < length or self._tables[0].device != device:
            cos, sin = rope_tables(max(length, self._reach), self._size, self._theta, device)
            self._tables = cos[:, None], sin[:, None]
        return self._tables


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Bidirectional attention over [batch, length, heads, head_dim], with grouped key and value heads."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    shared = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.requires_grad:
        # Not enable_gqa: the backward pass of its fused CPU kernel is about ten times slower than this.
        k, v = (x if shared == 1 else x.repeat_interleave(shared, dim=1) for x in (k, v))
        mixed: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=shared > 1)
    return mixed.transpose(1, 2)
