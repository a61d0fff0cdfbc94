"""What a DiffusionGemma `config.json` says of the text model."""

from enum import StrEnum
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor


class Kind(StrEnum):
    """What a layer's attention sees."""

    SLIDING = "sliding_attention"
    FULL = "full_attention"


class Rope(BaseModel):
    """How one kind of layer rotates.

    In "proportional" only the first `partial_rotary_factor` of all pairs is, at the frequencies of a whole head.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

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


class LayerConfig(BaseModel):
    """Where a layer differs from the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    head_dim: int | None = Field(None, gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)


class TextConfig(BaseModel):
    """`text_config`. Variants that are not built are refused by name."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_experts: int = Field(gt=0)
    top_k_experts: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    sliding_window: int = Field(gt=0)
    layer_types: tuple[Kind, ...]
    per_layer_config: dict[int, LayerConfig] = Field(default_factory=dict)
    rope_parameters: dict[Kind, Rope]
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = Field(30.0, gt=0)
    eos_token_id: int | tuple[int, ...] | None = 1

    hidden_activation: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    tie_word_embeddings: bool = True
    use_bidirectional_attention: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, data: Any) -> Any:
        """Full layers' heads, where a file says them once and not layer by layer, and the family's rotations."""
        if not isinstance(data, dict):
            return data
        published = {
            Kind.SLIDING: {"rope_theta": 10_000.0},
            Kind.FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
        }
        kinds, size = data.get("layer_types"), data.get("global_head_dim")
        per_layer = data.get("per_layer_config")
        if per_layer is None and isinstance(kinds, list) and size is not None:
            full = {"head_dim": size, "num_key_value_heads": data.get("num_global_key_value_heads")}
            per_layer = {i: full for i, kind in enumerate(kinds) if kind == Kind.FULL}
        return data | {
            "rope_parameters": data.get("rope_parameters") or published,
            "per_layer_config": per_layer or {},
        }

    @field_validator("use_bidirectional_attention")
    @classmethod
    def _text_is_causal(cls, value: str | None) -> str | None:
        if value not in (None, "vision"):  # "vision" is about images alone
            raise ValueError(f"{value!r} is a variant that is not built")
        return value

    @model_validator(mode="after")
    def _refuse_variants(self) -> Self:
        built = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True}
        for key, value in built.items():
            if getattr(self, key) != value:
                raise ValueError(f"{key} = {getattr(self, key)!r} is a variant that is not built (only {value!r} is)")
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
        for end in self.end_ids:
            if not 0 <= end < self.vocab_size:
                raise ValueError(f"eos_token_id = {end} is outside the vocabulary of {self.vocab_size}")
        return self

    @property
    def end_ids(self) -> frozenset[int]:
        ends = self.eos_token_id
        return frozenset(() if ends is None else (ends,) if isinstance(ends, int) else ends)

    def kind(self, index: int) -> Kind:
        """What that layer's attention sees."""
        return self.layer_types[index]

    def cache_shape(self, index: int) -> tuple[int, int]:
        """Heads of keys and values of a layer, and their size."""
        own = self.per_layer_config.get(index, LayerConfig())
        return own.num_key_value_heads or self.num_key_value_heads, own.head_dim or self.head_dim

    def head_size(self, kind: Kind) -> int:
        """Size of the heads of layers of this kind, all of which are alike."""
        return self.cache_shape(self.layer_types.index(kind))[1]

    def frequencies(self, kind: Kind) -> Tensor:
        """Angles a position turns each pair of a head by, float32 [head_dim / 2]; 0 where it is not turned."""
        rope, size = self.rope_parameters[kind], self.head_size(kind)
        turned = int(rope.partial_rotary_factor * size // 2)
        found = 1.0 / rope.rope_theta ** (torch.arange(0, 2 * turned, 2, dtype=torch.float32) / size)
        return torch.nn.functional.pad(found, (0, size // 2 - turned))


class DiffusionGemmaConfig(BaseModel):
    """`config.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    text_config: TextConfig
    canvas_length: int = Field(256, gt=0)
    tie_word_embeddings: bool = True
    mask_token_id: None = None

    @field_validator("tie_word_embeddings")
    @classmethod
    def _tied(cls, value: bool) -> bool:
        if not value:
            raise ValueError("False is a variant that is not built: encoder, decoder and head share their weights")
        return value

    @property
    def rows(self) -> int:
        return self.text_config.vocab_size

    @property
    def end_ids(self) -> frozenset[int]:
        return self.text_config.end_ids

    @property
    def max_length(self) -> int:
        return self.text_config.max_position_embeddings
