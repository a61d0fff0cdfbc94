"""SDAR and TraDo (JetAstra `modeling_sdar.py`): Qwen3 with block-causal attention."""

from typing import Any, ClassVar

from pydantic import model_validator
from torch import nn

from samplers import AttentionPattern
from server.models.config import Count
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer
from server.models.layers import RMSNorm, WideRMSNorm


class SDARConfig(DecoderConfig):
    """`config.json` of an SDAR checkpoint."""

    block_size: Count = 4
    attention_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _size_of_heads(cls, data: Any) -> Any:
        # As in Qwen3's class: null derives it from the width; if missing, it is the published models' size.
        return {"head_dim": 128} | data if isinstance(data, dict) else data

    @property
    def built(self) -> dict[str, Any]:
        return super().built | {"attention_bias": False}


class SDARLayer(Layer):
    """Layer with this family's norms."""

    norm: ClassVar[type[RMSNorm]] = WideRMSNorm


class SDAR(DecoderNetwork):
    """SDAR with a language model head. The original's norm kernel multiplies by the weight in float32."""

    norm: ClassVar[type[RMSNorm]] = WideRMSNorm
    Config: ClassVar[type[SDARConfig]] = SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.block_length = config.block_size
        self.pattern = AttentionPattern(causal_block=config.block_size, judges_drawn=True, strict=True)

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return SDARLayer(self.config, Attention(self.config, norm=self.norm), mlp)
