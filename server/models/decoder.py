"""Decoder shared by most families: Qwen's architecture, with the families' differences as options."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, Self, cast

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from server.models.config import Count, Layers, RotaryConfig
from server.models.layers import RMSNorm, RotaryTables, gated, rotate, split_heads
from server.models.network import Network
from server.models.ragged_batch import RaggedBatch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention function: queries, keys and values [tokens, heads, head_dim] to an output of the queries' shape."""


class DecoderConfig(RotaryConfig):
    """Keys of `config.json` that the network uses. Unsupported variants are refused by name.

    Defaults are those of Qwen2's and Qwen3's own classes.
    """

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count | None = None
    vocab_size: Count
    max_position_embeddings: Count = 32_768
    tie_word_embeddings: bool = False
    mask_token_id: int

    hidden_act: str = "silu"
    use_sliding_window: bool = False
    layer_types: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _heads_of_their_own(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("num_key_value_heads") is None:
            return data | {"num_key_value_heads": data.get("num_attention_heads")}
        return data

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.rotated_size % 2 or not self.rotated_size:
            raise ValueError(
                f"head_dim = {self.head_size} is odd"
                if self.partial_rotary_factor == 1
                else f"partial_rotary_factor = {self.partial_rotary_factor} of head_dim = {self.head_size} is not even"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is no multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}"
            )
        for kind in self.layer_types:
            if kind != "full_attention":
                raise ValueError(f"layer_types with {kind!r} is a variant that is not built (only 'full_attention' is)")
        return self

    @property
    def built(self) -> dict[str, Any]:
        return {"hidden_act": "silu", "use_sliding_window": False}

    @property
    def rows(self) -> int:
        return self.vocab_size

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotated_size(self) -> int:
        """Number of a head's dimensions, counted from the first, that are rotated by position."""
        return int(self.head_size * self.partial_rotary_factor)


class Projections(Protocol):
    """Linear parts of an attention layer."""

    def project(self, h: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (of the wanted tokens), keys and values, [n, heads, head_dim], of normed states [tokens, width]."""

    def output(self, read: Tensor) -> Tensor:
        """Project the attention output to the residual, [tokens, width]."""


class Attention(nn.Module):
    """Grouped-query attention, except for the attention operation itself.

    Args:
        bias: add a bias to queries, keys and values; the output never has one.
        norm: constructor of the norm over each head of queries and keys, before rotation; None for no norm.
    """

    def __init__(
        self, config: DecoderConfig, bias: bool = False, norm: Callable[[int, float], nn.Module] | None = None
    ) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_size
        self.head_dim = size
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        self.q_norm = norm(size, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = norm(size, config.rms_norm_eps) if norm else nn.Identity()

    def project(self, h: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        k, v = rotate(self.k_norm(self._heads(self.k_proj(h))), cos, sin), self._heads(self.v_proj(h))
        if wanted is not None:
            h, cos, sin = h[wanted], cos[wanted], sin[wanted]
        return rotate(self.q_norm(self._heads(self.q_proj(h))), cos, sin), k, v

    def output(self, read: Tensor) -> Tensor:
        out: Tensor = self.o_proj(read.flatten(-2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.head_dim)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    combine = staticmethod(gated)

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.combine(self.gate_proj(x), self.up_proj(x)))
        return out


class Layer(nn.Module):
    """Pre-norm transformer layer: attention and MLP, each with a residual connection.

    Attributes:
        attention_name: name of the attention module in checkpoints.
        norm: class of its norms.
    """

    attention_name: ClassVar[str] = "self_attn"
    norm: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: DecoderConfig, attention: Projections, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = self.norm(config.hidden_size, config.rms_norm_eps)
        self.add_module(self.attention_name, cast(nn.Module, attention))
        self.post_attention_layernorm = self.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, wanted: Tensor | None = None) -> Tensor:
        """States after this layer, [tokens, width]: of all tokens, or of the `wanted` ones (indices)."""
        q, k, v = self.project(x, cos, sin, wanted)
        return self.finish(x if wanted is None else x[wanted], attend(q, k, v))

    @property
    def projections(self) -> Projections:
        return cast(Projections, self.get_submodule(self.attention_name))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Part before attention: queries (of the wanted tokens), keys and values."""
        return self.projections.project(self.input_layernorm(x), cos, sin, wanted)

    def finish(self, x: Tensor, read: Tensor) -> Tensor:
        """Part after attention, given the attention output `read`."""
        x = x + self.projections.output(read)
        return x + self.feed_forward(self.post_attention_layernorm(x))

    def feed_forward(self, h: Tensor) -> Tensor:
        """Output of the MLP for normed states [tokens, width]."""
        out: Tensor = self.mlp(h)
        return out


class Decoder(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(
        self,
        config: DecoderConfig,
        make_layer: Callable[[int], nn.Module],
        embedding_name: str,
        norm: type[RMSNorm] = RMSNorm,
    ) -> None:
        super().__init__()
        self.add_module(embedding_name, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(make_layer(i) for i in range(config.num_hidden_layers))
        self.norm = norm(config.hidden_size, config.rms_norm_eps)


class DecoderNetwork(Network):
    """Network with tensors `model.*` and `lm_head`. Families define their layers in `make_layer`.

    Cosines and sines are computed in float32 and, as in the originals, rounded to the states' dtype before use.

    Attributes:
        embedding_name: name of the embedding in checkpoints.
        norm: class of the final norm.
    """

    config: DecoderConfig
    embedding_name: ClassVar[str] = "embed_tokens"
    norm: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, self.make_layer, self.embedding_name, self.norm)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        reach = min(config.max_length, 4096)
        self._tables = RotaryTables(config.rotated_size, config.rope_theta, reach)

    def make_layer(self, index: int) -> nn.Module:
        """Build the layer with this index."""
        return Layer(
            self.config, Attention(self.config), GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        )

    @property
    def embedding(self) -> nn.Embedding:
        embedding = self.model.get_submodule(self.embedding_name)
        assert isinstance(embedding, nn.Embedding)
        return embedding

    @classmethod
    def own_name(cls, config: DecoderConfig, name: str) -> str:
        if config.tie_word_embeddings and name == "lm_head.weight":
            return f"model.{cls.embedding_name}.weight"
        return name

    @property
    def cache_shapes(self) -> Sequence[tuple[int, int]]:
        return [(self.config.num_key_value_heads, self.config.head_size)] * self.config.num_hidden_layers

    def _rotation(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables of at least this length, [length, 1, rotated size]."""
        cos, sin = self._tables(length, self.embedding.weight.device)
        return cos.to(dtype), sin.to(dtype)

    def packed(self, batch: RaggedBatch) -> Tensor:
        x = self.embedding(batch.tokens)
        longest = max(row.visible for row in batch.rows)
        cos, sin = (table[batch.position] for table in self._rotation(longest, x.dtype))
        last = len(self.model.layers) - 1
        for index, layer in enumerate(self.model.layers):
            attend = partial(batch.attend, index, index == last)
            x = layer(x, cos, sin, attend, batch.wanted if index == last else None)
        out: Tensor = self.model.norm(x)
        return out

    def head(self, hidden: Tensor) -> Tensor:
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.embedding.weight)
        logits: Tensor = self.lm_head(hidden)
        return logits
