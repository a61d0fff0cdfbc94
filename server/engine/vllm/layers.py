"""Attention and MLP out of vLLM's parallel layers: split over ranks by heads and by width, quantised where asked."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from server.models.layers import rope_tables, rotate


class Rotation:
    """Cosines and sines of a batch's positions.

    Args:
        length: no position reaches it.
        head_dim, theta: see `rope_tables`.
        dtype: what they are rounded to before use.
    """

    def __init__(self, length: int, head_dim: int, theta: float, dtype: torch.dtype) -> None:
        self._shape = length, head_dim, theta
        self._dtype = dtype
        self._tables: tuple[Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, 1, head_dim] each."""
        if self._tables is None:
            cos, sin = rope_tables(*self._shape, positions.device)
            self._tables = cos.to(self._dtype)[:, None], sin.to(self._dtype)[:, None]
        return self._tables[0][positions], self._tables[1][positions]


class Heads:
    """How many heads of which size there are, and how many of them one rank has."""

    def __init__(self, width: int, queries: int, keys: int, size: int) -> None:
        ranks = get_tensor_model_parallel_world_size()
        self.width, self.queries, self.keys, self.size = width, queries, keys, size
        self.local_queries, self.local_keys = queries // ranks, max(1, keys // ranks)

    def projection(self, vllm_config: Any, prefix: str, bias: bool = False) -> Any:
        """Queries, keys and values in one product."""
        return QKVParallelLinear(
            self.width, self.size, self.queries, self.keys, bias, quant_config=vllm_config.quant_config, prefix=prefix
        )

    def output(self, vllm_config: Any, prefix: str) -> Any:
        """From what heads have read back to the model's width."""
        return RowParallelLinear(
            self.queries * self.size, self.width, bias=False, quant_config=vllm_config.quant_config, prefix=prefix
        )

    def attention(self, vllm_config: Any, prefix: str) -> Any:
        """Every position of a canvas reads all of it."""
        return EncoderOnlyAttention(
            self.local_queries,
            self.size,
            self.size**-0.5,
            num_kv_heads=self.local_keys,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )

    def read(self, projected: Tensor, attention: Any, cos: Tensor, sin: Tensor) -> Tensor:
        """What this rank's heads read, [tokens, heads * size], from a projection [tokens, ...]."""
        queries, keys = self.local_queries * self.size, self.local_keys * self.size
        q, k, v = torch.split(projected, [queries, keys, keys], dim=-1)
        q = rotate(q.reshape(len(q), -1, self.size), cos, sin).flatten(-2)
        k = rotate(k.reshape(len(k), -1, self.size), cos, sin).flatten(-2)
        mixed: Tensor = attention(q, k, v.contiguous())
        return mixed


def gate_and_up(width: int, inner: int, vllm_config: Any, prefix: str) -> Any:
    """Both inner projections of a gated MLP in one product."""
    return MergedColumnParallelLinear(
        width, [inner] * 2, bias=False, quant_config=vllm_config.quant_config, prefix=prefix
    )


def down(width: int, inner: int, vllm_config: Any, prefix: str) -> Any:
    """The outer projection of an MLP."""
    return RowParallelLinear(inner, width, bias=False, quant_config=vllm_config.quant_config, prefix=prefix)


def gated(both: Tensor) -> Tensor:
    """`silu(gate) * up` of the two side by side."""
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up
