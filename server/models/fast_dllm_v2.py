"""Fast-dLLM v2 (Efficient-Large-Model `modeling.py`): Qwen2.5 that sees both ways within a block, and back.

Its outputs are still about the next position.
"""

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import nn

from samplers import Scheme
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer

SMALL_BLOCK = 8
"""What its `generate` denoises together."""


class FastDLLMConfig(DecoderConfig):
    """`config.json` of a Fast-dLLM v2 checkpoint."""

    published: ClassVar = {"mask_token_id": 151665}

    bd_size: int = Field(32, gt=0)
    layer_types: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _refuse_windows(self) -> Self:
        for kind in self.layer_types or ():
            if kind != "full_attention":
                raise ValueError(f"layer_types with {kind!r} is a variant that is not built (only 'full_attention' is)")
        return self


class FastDLLM(DecoderNetwork):
    """The network."""

    Config = FastDLLMConfig

    def __init__(self, config: FastDLLMConfig) -> None:
        super().__init__(config)
        self.scheme = Scheme(causal_block=config.bd_size, fixed=True, shifted=True, judges_drawn=True, strict=True)
        self.block_length = config.bd_size if config.bd_size % SMALL_BLOCK else SMALL_BLOCK

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return Layer(self.config, Attention(self.config, bias=True), mlp)
