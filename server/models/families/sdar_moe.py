"""SDAR with mixtures of experts (JetAstra `modeling_sdar_moe.py`): Qwen3-MoE with block-causal attention."""

from typing import Any, ClassVar, Self

from pydantic import model_validator
from torch import nn

from server.models.config import Count
from server.models.decoder import Attention
from server.models.experts import SoftmaxMixture
from server.models.families.sdar import SDAR, SDARConfig, SDARLayer


class SDARMoEConfig(SDARConfig):
    """`config.json` of an SDAR-MoE checkpoint."""

    num_experts: Count
    num_experts_per_tok: Count
    moe_intermediate_size: Count
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[int, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _size_of_heads(cls, data: Any) -> Any:
        return data  # Qwen3-MoE's class has no default size

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = {self.num_experts}"
            )
        return self

    def mixed(self, index: int) -> bool:
        """True if the layer with this index has experts."""
        return index not in self.mlp_only_layers and (index + 1) % self.decoder_sparse_step == 0


class SDARMoE(SDAR):
    """SDAR-MoE with a language model head."""

    Config: ClassVar[type[SDARMoEConfig]] = SDARMoEConfig
    config: SDARMoEConfig

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        if not config.mixed(index):
            return super().make_layer(index)
        mixture = SoftmaxMixture(
            config.hidden_size,
            config.moe_intermediate_size,
            config.num_experts,
            config.num_experts_per_tok,
            normalised=config.norm_topk_prob,
        )
        return SDARLayer(config, Attention(config, norm=self.norm), mixture)
