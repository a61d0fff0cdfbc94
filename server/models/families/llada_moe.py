"""LLaDA-MoE (inclusionAI `modeling_lladamoe.py`): bidirectional attention, most layers mixtures of experts."""

from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from server.models.config import MAX_COUNT, Count
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer, Projections
from server.models.experts import SoftmaxMixture
from server.models.layers import RMSNorm


class LLaDAMoEConfig(DecoderConfig):
    """`config.json` of a LLaDA-MoE checkpoint.

    `norm_topk_prob`, `routed_scaling_factor` and `router_num_group` are ignored, as by the original's router.
    """

    published: ClassVar = {"rms_norm_eps": 1e-5}

    intermediate_size: int = Field(gt=0, le=MAX_COUNT, validation_alias="dense_intermediate_size")
    expert_intermediate_size: Count
    shared_expert_intermediate_size: Count | None = None
    num_experts: Count
    num_experts_per_tok: Count
    moe_layer_freq: tuple[int, ...]
    moe_router_enable_expert_bias: bool = False
    qk_layernorm: bool = False

    attention_bias: bool = False
    clip_qkv: float | None = None
    moe_router_score_function: str = "softmax"

    @model_validator(mode="after")
    def _check_layers(self) -> "LLaDAMoEConfig":
        given, layers = len(self.moe_layer_freq), self.num_hidden_layers
        if given != layers:
            raise ValueError(f"moe_layer_freq has {given} entries for num_hidden_layers = {layers}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = {self.num_experts}"
            )
        return self

    @property
    def built(self) -> dict[str, Any]:
        return super().built | {
            "attention_bias": False,
            "clip_qkv": None,
            "moe_router_score_function": "softmax",
        }


class MoELayer(Layer):
    """Layer whose MLP may be accompanied by an expert that all tokens share."""

    def __init__(
        self, config: LLaDAMoEConfig, attention: Projections, mlp: nn.Module, shared: nn.Module | None
    ) -> None:
        super().__init__(config, attention, mlp)
        self.shared_expert = shared

    def feed_forward(self, h: Tensor) -> Tensor:
        out = super().feed_forward(h)
        return out if self.shared_expert is None else out + self.shared_expert(h)


class LLaDAMoE(DecoderNetwork):
    """LLaDA-MoE with a language model head."""

    Config = LLaDAMoEConfig
    config: LLaDAMoEConfig
    float32: ClassVar[tuple[str, ...]] = ("*.mlp.expert_bias",)

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        attention = Attention(config, norm=RMSNorm if config.qk_layernorm else None)
        if not config.moe_layer_freq[index]:
            return Layer(config, attention, GatedMLP(config.hidden_size, config.intermediate_size))
        inner = config.shared_expert_intermediate_size
        shared = None if inner is None else GatedMLP(config.hidden_size, inner)
        mixture = SoftmaxMixture(
            config.hidden_size,
            config.expert_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            biased=config.moe_router_enable_expert_bias,  # false in published checkpoints
        )
        return MoELayer(config, attention, mixture, shared)
