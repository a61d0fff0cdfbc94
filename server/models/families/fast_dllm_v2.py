"""Fast-dLLM v2 (Efficient-Large-Model `modeling.py`): Qwen2.5 with block-causal attention.

Outputs are still about the next position.
"""

from torch import nn

from samplers import AttentionPattern
from server.models.config import Count
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer

SMALL_BLOCK = 8
"""Number of positions that the original `generate` denoises together."""


class FastDLLMConfig(DecoderConfig):
    """`config.json` of a Fast-dLLM v2 checkpoint."""

    bd_size: Count = 32


class FastDLLM(DecoderNetwork):
    """Fast-dLLM v2 with a language model head."""

    Config = FastDLLMConfig

    def __init__(self, config: FastDLLMConfig) -> None:
        super().__init__(config)
        self.pattern = AttentionPattern(
            causal_block=config.bd_size, fixed=True, shifted=True, judges_drawn=True, strict=True
        )
        self.block_length = config.bd_size if config.bd_size % SMALL_BLOCK else SMALL_BLOCK

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return Layer(self.config, Attention(self.config, bias=True), mlp)
