"""SDAR and TraDo (JetAstra `modeling_sdar.py`): Qwen3 that sees both ways within a block, and back."""

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from samplers import Scheme
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer
from server.models.layers import RMSNorm


class SDARConfig(DecoderConfig):
    """`config.json` of an SDAR checkpoint."""

    published: ClassVar = {"mask_token_id": 151669}

    block_size: int = Field(4, gt=0)
    attention_bias: bool = False

    @property
    def built(self) -> dict[str, Any]:
        return super().built | {"attention_bias": False}


class SDAR(DecoderNetwork):
    """The network."""

    Config: ClassVar[type[SDARConfig]] = SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.block_length = config.block_size
        self.scheme = Scheme(causal_block=config.block_size, judges_drawn=True, strict=True)

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return Layer(self.config, Attention(self.config, norm=RMSNorm), mlp)
