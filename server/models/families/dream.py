"""Dream-7B, Dream-Coder and DiffuCoder (DreamLM `modeling_dream.py`): Qwen2.5 with bidirectional attention.

Outputs are still about the next position.
"""

from torch import nn

from samplers import AttentionPattern
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer


class DreamConfig(DecoderConfig):
    """`config.json` of a Dream checkpoint."""


class Dream(DecoderNetwork):
    """Dream with a language model head."""

    Config = DreamConfig
    pattern = AttentionPattern(shifted=True)

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return Layer(self.config, Attention(self.config, bias=True), mlp)
