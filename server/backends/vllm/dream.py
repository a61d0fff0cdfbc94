"""Dream built from vLLM's layers: Qwen2's tensors, bidirectional attention, outputs shifted by one position.

Module names are the checkpoint's own, except for fused layers.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from server.backends.vllm.denoiser import Denoiser
from server.backends.vllm.layers import Heads, Rotation, down, gate_and_up, gated
from server.models.layers import RMSNorm


class Attention(nn.Module):
    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.heads = Heads(config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_size)
        self.qkv_proj = self.heads.projection(vllm_config, f"{prefix}.qkv_proj", bias=True)
        self.attention = self.heads.attention(vllm_config, f"{prefix}.attention")
        self.o_proj = self.heads.output(vllm_config, f"{prefix}.o_proj")

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected, _ = self.qkv_proj(h)
        out: Tensor
        out, _ = self.o_proj(self.heads.read(projected, self.attention, cos, sin))
        return out


class GatedMLP(nn.Module):
    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = gate_and_up(width, inner, vllm_config, f"{prefix}.gate_up_proj")
        self.down_proj = down(width, inner, vllm_config, f"{prefix}.down_proj")

    def forward(self, h: Tensor) -> Tensor:
        both, _ = self.gate_up_proj(h)
        out: Tensor
        out, _ = self.down_proj(gated(both))
        return out


class Layer(nn.Module):
    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config, vllm_config, f"{prefix}.mlp")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            Layer(config, vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Dream(Denoiser):
    """Dream with a language model head."""

    shifted = True
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, model = self.config, vllm_config.model_config
        self.model = Decoder(config, vllm_config, "model")
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config, prefix="lm_head"
            )
        # The original rounds cosines and sines to the dtype of the states, where LLaDA rotates in float32.
        self._rotation = Rotation(model.max_model_len, config.head_size, config.rope_theta, model.dtype)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed_input_ids(input_ids)
        cos, sin = self._rotation(positions)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.model.norm(x)
        return out

    @property
    def head_layer(self) -> nn.Module:
        layer: nn.Module = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return layer
