"""Dream-7B, Dream-Coder and DiffuCoder (DreamLM `modeling_dream.py`): Qwen2.5 that sees both ways.

Its outputs are still about the next position.
"""

from typing import Any

from pydantic import model_validator
from torch import nn

from samplers import Scheme
from server.models.decoder import Attention, DecoderConfig, DecoderNetwork, GatedMLP, Layer


class DreamConfig(DecoderConfig):
    """`config.json` of a Dream checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _need_a_mask(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("mask_token_id") is None:
            raise ValueError("mask_token_id is not given, and the tokenizer has no <|mask|>")
        return data


class Dream(DecoderNetwork):
    """The network."""

    Config = DreamConfig
    scheme = Scheme(shifted=True)

    def make_layer(self, index: int) -> nn.Module:
        mlp = GatedMLP(self.config.hidden_size, self.config.intermediate_size)
        return Layer(self.config, Attention(self.config, bias=True), mlp)
