"""LLaDA-8B and LLaDA-1.5 (ML-GSAI `modeling_llada.py`): Llama blocks with bidirectional attention.

Modules are named as in the checkpoint, so that a state dict needs no renaming.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from server.models.config import Count, Layers, RotaryConfig
from server.models.layers import RMSNorm, RotaryTables, attention, gated, rotate, split_heads
from server.models.network import Network
from server.models.ragged_batch import RaggedBatch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention function: queries, keys and values [..., heads, head_dim] to an output of the queries' shape, with grouped
key and value heads."""


class LLaDAConfig(RotaryConfig):
    """Keys of a LLaDA `config.json` that the network uses. Unsupported variants are refused by name."""

    d_model: Count
    n_layers: Layers
    n_heads: Count
    n_kv_heads: Count
    multi_query_attention: bool | None = None
    mlp_hidden_size: Count | None = None
    mlp_ratio: Count = 4
    vocab_size: Count
    embedding_size: Count | None = None
    max_sequence_length: Count
    rope_full_precision: bool = True
    rms_norm_eps: float = Field(1e-5, ge=0)
    weight_tying: bool = False
    mask_token_id: int
    pad_token_id: int | None = None

    layer_norm_type: str = "rms"
    activation_type: str = "silu"
    block_type: str = "llama"
    block_group_size: int = 1
    rope: bool = True
    alibi: bool = False
    attention_layer_norm: bool = False
    input_emb_norm: bool = False
    scale_logits: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    clip_qkv: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _heads_of_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("n_kv_heads") is not None:
            return data
        return data | {"n_kv_heads": 1 if data.get("multi_query_attention") else data.get("n_heads")}

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(f"d_model = {self.d_model} does not divide into {self.n_heads} heads of even size")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} is no multiple of n_kv_heads = {self.n_kv_heads}")
        said = {None: self.n_kv_heads, True: 1, False: self.n_heads}[self.multi_query_attention]
        if said != self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} contradicts multi_query_attention = {self.multi_query_attention}"
            )
        return self

    @property
    def built(self) -> dict[str, Any]:
        return {
            "layer_norm_type": "rms",
            "activation_type": "silu",
            "block_type": "llama",
            "block_group_size": 1,
            "rope": True,
            "partial_rotary_factor": 1,
            "alibi": False,
            "attention_layer_norm": False,
            "input_emb_norm": False,
            "scale_logits": False,
            "include_bias": False,
            "include_qkv_bias": False,
            "clip_qkv": None,
        }

    @property
    def rows(self) -> int:
        return self.embedding_size or self.vocab_size

    @property
    def max_length(self) -> int:
        return self.max_sequence_length

    @property
    def mlp_width(self) -> int:
        return self.mlp_hidden_size or self.mlp_ratio * self.d_model

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


class Block(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, mlp = config.d_model, config.mlp_width
        keys = config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, mlp, bias=False)
        self.up_proj = nn.Linear(width, mlp, bias=False)
        self.ff_out = nn.Linear(mlp, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """States after this block, [..., width]: of all tokens, or of the `wanted` ones.

        Args:
            x: [tokens, width] or [batch, length, width].
            cos, sin: tables for each token's position, [..., 1, head_dim].
            wanted: indices of tokens; the others are only attended to.
        """
        q, k, v = self.project(x, cos, sin, wanted)
        return self.finish(x if wanted is None else x[wanted], attend(q, k, v))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Part before attention: queries (of the wanted tokens), keys and values."""
        h = self.attn_norm(x)
        k, v = rotate(self._heads(self.k_proj(h)), cos, sin), self._heads(self.v_proj(h))
        if wanted is not None:
            h, cos, sin = h[wanted], cos[wanted], sin[wanted]
        return rotate(self._heads(self.q_proj(h)), cos, sin), k, v

    def finish(self, x: Tensor, read: Tensor) -> Tensor:
        """Part after attention, given the attention output `read`."""
        x = x + self.attn_out(read.flatten(-2))
        h = self.ff_norm(x)
        out: Tensor = x + self.ff_out(gated(self.ff_proj(h), self.up_proj(h)))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.head_dim)


class Transformer(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.rows, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = nn.Linear(config.d_model, config.rows, bias=False)


class LLaDA(Network):
    """LLaDA with a language model head. `hidden` runs the blocks, `head` maps any selection of its rows to logits."""

    Config = LLaDAConfig
    config: LLaDAConfig

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"transformer": Transformer(config)})
        reach = min(config.max_sequence_length, 4096)
        self._tables = RotaryTables(config.head_dim, config.rope_theta, reach)

    @property
    def transformer(self) -> Transformer:
        transformer = self.model["transformer"]
        assert isinstance(transformer, Transformer)
        return transformer

    def _rotation(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables of at least this length, [length, 1, head_dim]."""
        cos, sin = self._tables(length, self.transformer.wte.weight.device)
        return (cos, sin) if self.config.rope_full_precision else (cos.to(dtype), sin.to(dtype))

    @classmethod
    def own_name(cls, config: LLaDAConfig, name: str) -> str:
        if config.weight_tying and name == "model.transformer.ff_out.weight":
            return "model.transformer.wte.weight"
        return name

    @property
    def cache_shapes(self) -> Sequence[tuple[int, int]]:
        return [(self.config.n_kv_heads, self.config.head_dim)] * self.config.n_layers

    def hidden(self, tokens: Tensor) -> Tensor:
        # not through `packed`, whose in-place operations do not support gradients
        x = self.transformer.wte(tokens)
        length = tokens.shape[1]
        cos, sin = (table[:length] for table in self._rotation(length, x.dtype))
        for block in self.transformer.blocks:
            x = block(x, cos, sin, attention)
        out: Tensor = self.transformer.ln_f(x)
        return out

    def packed(self, batch: RaggedBatch) -> Tensor:
        x = self.transformer.wte(batch.tokens)
        longest = max(row.visible for row in batch.rows)
        cos, sin = (table[batch.position] for table in self._rotation(longest, x.dtype))
        last = len(self.transformer.blocks) - 1
        for layer, block in enumerate(self.transformer.blocks):
            attend = partial(batch.attend, layer, layer == last)
            x = block(x, cos, sin, attend, batch.wanted if layer == last else None)
        out: Tensor = self.transformer.ln_f(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        if self.config.weight_tying:
            return F.linear(hidden, self.transformer.wte.weight)
        logits: Tensor = self.transformer.ff_out(hidden)
        return logits
