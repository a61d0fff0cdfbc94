"""SDAR and TraDo (JetAstra `modeling_sdar.py`): Qwen3 that sees both ways within a block, and back."""

from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from samplers import Scheme
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer
from server.models.layers import RMSNorm

MASK_TOKEN_ID = 151669


class SDARConfig(DecoderConfig):
    """`config.json` of an SDAR checkpoint."""

    block_size: int = Field(4, gt=0)
    attention_bias: bool = False

    @model_validator(mode="before")
    @classmethod
    def _published_defaults(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("mask_token_id") is None:
            return {**data, "mask_token_id": MASK_TOKEN_ID}
        return data

    @property
    def built(self) -> dict[str, Any]:
        return super().built | {"attention_bias": False}


class SDAR(DecoderNetwork):
    """The network."""

    Config: ClassVar[type[SDARConfig]] = SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.block_length = config.block_size
        self.scheme = Scheme(causal_block=config.block_size)

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return Layer(self.config, Attention(self.config, norm=RMSNorm), mlp)
