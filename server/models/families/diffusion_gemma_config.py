"""Configuration of DiffusionGemma's text model."""

from enum import StrEnum
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from server.models.config import MAX_LAYERS, CheckpointConfig, Count, Layers, TokenIds

GLOBAL_HEAD_DIM = 512
"""Default head size of full-attention layers."""
PATTERN = 6
"""Every layer with an index divisible by this, counted from 1, has full attention by default."""


class Kind(StrEnum):
    """Kind of a layer's attention."""

    SLIDING = "sliding_attention"
    FULL = "full_attention"


class Rope(BaseModel):
    """Rotary embedding of one kind of layer.

    "proportional" rotates only the first `partial_rotary_factor` of all pairs, at the frequencies of a full head.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    rope_type: str = "default"
    rope_theta: float = Field(gt=0)
    partial_rotary_factor: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _refuse_variants(self) -> Self:
        if self.rope_type not in ("default", "proportional"):
            raise ValueError(f"rope_type = {self.rope_type!r} is a variant that is not built")
        if self.rope_type == "default" and self.partial_rotary_factor != 1:
            raise ValueError("partial_rotary_factor below 1 is built for the rope_type 'proportional' only")
        return self


ROTATIONS = {
    Kind.SLIDING: {"rope_theta": 10_000.0},
    Kind.FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
"""Default rotary embedding of both kinds of layers."""


class LayerConfig(BaseModel):
    """Parameters of one layer that override those of the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    head_dim: Count | None = None
    num_key_value_heads: Count | None = None


class TextConfig(CheckpointConfig):
    """`text_config`, with the defaults of the original's class."""

    hidden_size: Count
    intermediate_size: Count
    moe_intermediate_size: Count
    num_experts: Count
    top_k_experts: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count = 4
    head_dim: Count = 256
    vocab_size: Count = 262_144
    max_position_embeddings: Count = 131_072
    sliding_window: Count = 512
    layer_types: tuple[Kind, ...]
    per_layer_config: dict[int, LayerConfig] = Field(default_factory=dict)
    rope_parameters: dict[Kind, Rope]
    final_logit_softcapping: float = Field(30.0, gt=0)
    eos_token_id: TokenIds = 1

    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    use_bidirectional_attention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _kinds_of_layers(cls, data: Any) -> Any:
        """Fill in the kinds of layers, the head size of full-attention layers if given once, and rotary embeddings."""
        if not isinstance(data, dict):
            return data
        kinds, layers = data.get("layer_types"), data.get("num_hidden_layers")
        if kinds is None and isinstance(layers, int) and layers <= MAX_LAYERS:
            kinds = [Kind.SLIDING if (index + 1) % PATTERN else Kind.FULL for index in range(layers)]
        if isinstance(kinds, list) and kinds:
            kinds = [*kinds[:-1], Kind.FULL]  # like the original, whatever the file says
        per_layer = data.get("per_layer_config")
        if per_layer is None and isinstance(kinds, list):
            size, heads = data.get("global_head_dim"), data.get("num_global_key_value_heads")
            full = {"head_dim": GLOBAL_HEAD_DIM if size is None else size, "num_key_value_heads": heads}
            per_layer = {i: full for i, kind in enumerate(kinds) if kind == Kind.FULL}
        given = data.get("rope_parameters")
        return data | {
            "layer_types": kinds,
            "per_layer_config": per_layer,
            "rope_parameters": ROTATIONS if given is None else given,
        }

    @field_validator("use_bidirectional_attention")
    @classmethod
    def _text_is_causal(cls, value: str | None) -> str | None:
        if value not in (None, "vision"):  # "vision" concerns images only
            raise ValueError(f"{value!r} is a variant that is not built")
        return value

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"{len(self.layer_types)} layer_types for num_hidden_layers = {self.num_hidden_layers}")
        if missing := set(self.layer_types) - set(self.rope_parameters):
            raise ValueError(f"rope_parameters do not say how {min(missing)} rotates")
        if self.top_k_experts > self.num_experts:
            raise ValueError(f"top_k_experts = {self.top_k_experts} of num_experts = {self.num_experts}")
        for index, kind in enumerate(self.layer_types):
            heads, size = self.cache_shape(index)
            if self.num_attention_heads % heads:
                raise ValueError(
                    f"layer {index}: num_attention_heads = {self.num_attention_heads} is no multiple of "
                    f"num_key_value_heads = {heads}"
                )
            if size % 2:
                raise ValueError(f"layer {index}: head_dim = {size} is odd")
            if size != self.head_size(kind):
                raise ValueError(f"layer {index}: head_dim = {size}, but other {kind} layers have another")
        return self

    @property
    def built(self) -> dict[str, Any]:
        return {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True}

    @property
    def rows(self) -> int:
        return self.vocab_size

    def kind(self, index: int) -> Kind:
        """Kind of attention of that layer."""
        return self.layer_types[index]

    def cache_shape(self, index: int) -> tuple[int, int]:
        """Number and size of a layer's key-value heads."""
        own = self.per_layer_config.get(index, LayerConfig())
        return own.num_key_value_heads or self.num_key_value_heads, own.head_dim or self.head_dim

    def head_size(self, kind: Kind) -> int:
        """Head size of layers of this kind."""
        return self.cache_shape(self.layer_types.index(kind))[1]

    def frequencies(self, kind: Kind) -> Tensor:
        """Rotation of each pair of a head per position, in radians, float32 [head_dim / 2]; 0 for unrotated pairs."""
        rope, size = self.rope_parameters[kind], self.head_size(kind)
        turned = int(rope.partial_rotary_factor * size // 2)
        found = 1.0 / rope.rope_theta ** (torch.arange(0, 2 * turned, 2, dtype=torch.float32) / size)
        return torch.nn.functional.pad(found, (0, size // 2 - turned))


class DiffusionGemmaConfig(CheckpointConfig):
    """`config.json`."""

    text_config: TextConfig
    canvas_length: Count = 256
    tie_word_embeddings: bool = True

    @property
    def built(self) -> dict[str, Any]:
        # Otherwise encoder, decoder and head would have separate weights.
        return {"tie_word_embeddings": True}

    @property
    def mask_token_id(self) -> None:
        """None, even if the tokenizer's mask token, which the model does not use, is declared."""
        return None

    @property
    def rows(self) -> int:
        return self.text_config.vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        return super().end_ids | self.text_config.end_ids

    @property
    def max_length(self) -> int:
        return self.text_config.max_position_embeddings
