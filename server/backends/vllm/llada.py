"""LLaDA built from vLLM's layers; computes the same as `server.models.families.llada`.

Module names are the checkpoint's own, except for fused layers.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from server.backends.vllm.denoiser import Denoiser
from server.backends.vllm.layers import Heads, Rotation, down, gate_and_up, gated
from server.models.families.llada import LLaDAConfig
from server.models.layers import RMSNorm


class Block(nn.Module):
    def __init__(self, config: LLaDAConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        width, inner = config.d_model, config.mlp_width
        self.heads = Heads(width, config.n_heads, config.n_kv_heads, config.head_dim)
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.qkv_proj = self.heads.projection(vllm_config, f"{prefix}.qkv_proj")
        self.attention = self.heads.attention(vllm_config, f"{prefix}.attention")
        self.attn_out = self.heads.output(vllm_config, f"{prefix}.attn_out")
        self.gate_up_proj = gate_and_up(width, inner, vllm_config, f"{prefix}.gate_up_proj")
        self.ff_out = down(width, inner, vllm_config, f"{prefix}.ff_out")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projected, _ = self.qkv_proj(self.attn_norm(x))
        out: Tensor
        mixed, _ = self.attn_out(self.heads.read(projected, self.attention, cos, sin))
        x = x + mixed
        both, _ = self.gate_up_proj(self.ff_norm(x))
        out, _ = self.ff_out(gated(both))
        out = x + out
        return out


class Transformer(nn.Module):
    def __init__(self, config: LLaDAConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        quantization = vllm_config.quant_config
        self.wte = VocabParallelEmbedding(
            config.rows, config.d_model, quant_config=quantization, prefix=f"{prefix}.wte"
        )
        self.blocks = nn.ModuleList(Block(config, vllm_config, f"{prefix}.blocks.{i}") for i in range(config.n_layers))
        self.ln_f = RMSNorm(config.d_model, config.rms_norm_eps)
        if not config.weight_tying:
            self.ff_out = ParallelLMHead(
                config.rows, config.d_model, quant_config=quantization, prefix=f"{prefix}.ff_out"
            )


class LLaDA(Denoiser):
    """LLaDA with a language model head."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["ff_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, model = self.config, vllm_config.model_config
        self.model = nn.ModuleDict({"transformer": Transformer(config, vllm_config, "model.transformer")})
        precision = torch.float32 if config.rope_full_precision else model.dtype
        self._rotation = Rotation(model.max_model_len, config.head_dim, config.rope_theta, precision)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        transformer: Any = self.model["transformer"]
        out: Tensor = transformer.wte(input_ids)
        return out

    def hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        transformer: Any = self.model["transformer"]
        x = self.embed_input_ids(input_ids)
        cos, sin = self._rotation(positions)
        for block in transformer.blocks:
            x = block(x, cos, sin)
        out: Tensor = transformer.ln_f(x)
        return out

    @property
    def head_layer(self) -> nn.Module:
        transformer: Any = self.model["transformer"]
        layer: nn.Module = transformer.wte if self.config.weight_tying else transformer.ff_out
        return layer
