"""Attention and MLP from vLLM's parallel layers: split over ranks by heads and by width, quantised if configured."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.selector import get_attn_backend

from server.models.layers import rope_tables, rotate


class Rotation:
    """Cosines and sines of a batch's positions for rotary embedding.

    Args:
        length: exclusive upper bound of positions.
        head_dim, theta: see `rope_tables`.
        dtype: type to which the tables are rounded.
    """

    def __init__(self, length: int, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        self._shape = length, head_dim, theta
        self._dtype = dtype
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, [tokens, 1, head_dim] each."""
        if self._tables is None:
            cos, sin = rope_tables(*self._shape, positions.device)
            self._tables = cos.to(self._dtype)[:, None], sin.to(self._dtype)[:, None]
        return self._tables[0][positions], self._tables[1][positions]


def kernel_size(size: int) -> int:
    """Smallest head size of at least `size` that vLLM's attention kernels support here."""
    some = 128  # supported by all of them
    backend = get_attn_backend(some, torch.get_default_dtype(), "auto", attn_type=AttentionType.ENCODER_ONLY)
    fitting = [each for each in backend.get_supported_head_sizes() if each >= size]
    return min(fitting, default=size)


class Heads:
    """Number and size of attention heads, in total and on this rank.

    Heads of unsupported sizes, as in small models, are padded with zeros, which changes no product.
    """

    def __init__(self, width: int, queries: int, keys: int, size: int) -> None:
        self.filled = kernel_size(size)
        ranks = get_tensor_model_parallel_world_size()
        self.width, self.queries, self.keys, self.size = width, queries, keys, size
        self.local_queries, self.local_keys = queries // ranks, max(1, keys // ranks)

    def projection(self, vllm_config: Any, prefix: str, bias: bool = False) -> Any:
        """Fused projection of queries, keys and values."""
        return QKVParallelLinear(
            self.width, self.size, self.queries, self.keys, bias, quant_config=vllm_config.quant_config, prefix=prefix
        )

    def output(self, vllm_config: Any, prefix: str) -> Any:
        """Projection of the attention output to the model's width."""
        return RowParallelLinear(
            self.queries * self.size, self.width, bias=False, quant_config=vllm_config.quant_config, prefix=prefix
        )

    def attention(self, vllm_config: Any, prefix: str) -> Any:
        """Bidirectional attention over a canvas."""
        return EncoderOnlyAttention(
            self.local_queries,
            self.filled,
            self.size**-0.5,
            num_kv_heads=self.local_keys,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )

    def read(self, projected: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention output of this rank's heads, [tokens, heads * size], from a fused projection [tokens, ...]."""
        queries, keys = self.local_queries * self.size, self.local_keys * self.size
        q, k, v = torch.split(projected, [queries, keys, keys], dim=-1)
        q, k, v = (x.reshape(len(x), -1, self.size) for x in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.filled > self.size:
            q, k, v = (F.pad(x, (0, self.filled - self.size)) for x in (q, k, v))
        mixed: Tensor = attention(q.flatten(-2), k.flatten(-2), v.flatten(-2))
        return mixed.view(len(mixed), -1, self.filled)[..., : self.size].flatten(-2)


def gate_and_up(width: int, inner: int, vllm_config: Any, prefix: str) -> Any:
    """Fused inner projections of a gated MLP."""
    return MergedColumnParallelLinear(
        width, [inner] * 2, bias=False, quant_config=vllm_config.quant_config, prefix=prefix
    )


def down(width: int, inner: int, vllm_config: Any, prefix: str) -> Any:
    """Output projection of an MLP."""
    return RowParallelLinear(inner, width, bias=False, quant_config=vllm_config.quant_config, prefix=prefix)


def gated(both: Tensor) -> Tensor:
    """`silu(gate) * up` of the two halves of the last dimension."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
