"""LLaDA2.0 and 2.1 (inclusionAI `modeling_llada2_moe.py`): mixtures of experts with block-causal attention."""

import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from samplers import AttentionPattern
from server.models.config import MAX_EXPERTS, Count
from server.models.decoder import DecoderConfig, DecoderNetwork, GatedMLP, Layer
from server.models.experts import highest, mix
from server.models.layers import RMSNorm, rotate

BLOCK_LENGTH = 32


class LLaDA2Config(DecoderConfig):
    """`config.json` of a LLaDA2 checkpoint, with the defaults of the original's class."""

    published: ClassVar = {"max_position_embeddings": 16_384, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5}

    moe_intermediate_size: Count
    num_experts: Count
    num_experts_per_tok: Count
    num_shared_experts: int | None = Field(None, ge=0, le=MAX_EXPERTS)
    n_group: Count = 8
    topk_group: Count = 4
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = Field(0, ge=0)

    use_bias: bool = True
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    norm_head: bool = False
    norm_topk_prob: bool = True
    score_function: str = "sigmoid"
    router_dtype: str = "fp32"
    moe_router_enable_expert_bias: bool = True
    expert_capacity: float | None = None
    block_size: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _padding_ends_the_text(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("eos_token_id") is not None:
            return data
        return data | {"eos_token_id": data.get("pad_token_id")}

    @model_validator(mode="after")
    def _check_router(self) -> "LLaDA2Config":
        if self.num_experts % self.n_group or self.num_experts // self.n_group < 2:
            raise ValueError(f"num_experts = {self.num_experts} is not n_group = {self.n_group} groups of two or more")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group = {self.topk_group} is more than n_group = {self.n_group}")
        reach = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reach:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than the {reach} experts of "
                f"topk_group = {self.topk_group} groups"
            )
        return self

    @property
    def built(self) -> dict[str, Any]:
        # The original ignores the router's options and, in 2.0 and 2.1, the capacity; other values belong to other
        # models (2.2 routes block by block).
        return super().built | {
            "use_bias": False,
            "use_qkv_bias": False,
            "use_qk_norm": True,
            "norm_head": False,
            "norm_topk_prob": True,
            "score_function": "sigmoid",
            "router_dtype": ("fp32", "float32"),
            "moe_router_enable_expert_bias": True,
            "expert_capacity": None,
            "block_size": None,
        }


class FusedAttention(nn.Module):
    """Grouped-query attention with a fused projection and norms over each head."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.head_dim = config.head_size
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        rows = (self.heads + 2 * self.key_heads) * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, rows, bias=False)
        self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def project(self, h: Tensor, cos: Tensor, sin: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        mixed = self.query_key_value(h).view(len(h), -1, self.head_dim)
        q, k, v = mixed.split([self.heads, self.key_heads, self.key_heads], dim=1)
        k = rotate(self.key_layernorm(k), cos, sin)
        if wanted is not None:
            q, cos, sin = q[wanted], cos[wanted], sin[wanted]
        return rotate(self.query_layernorm(q), cos, sin), k, v

    def output(self, read: Tensor) -> Tensor:
        out: Tensor = self.dense(read.flatten(-2))
        return out


class Router(nn.Module):
    """Chooses a token's experts within the best groups, in float32.

    Its weight has the model's dtype; `expert_bias` stays float32, see `LLaDA2.float32`.
    """

    expert_bias: Tensor

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.count, self.groups, self.kept = config.num_experts_per_tok, config.n_group, config.topk_group
        self.scale = config.routed_scaling_factor
        self.weight = nn.Linear(config.hidden_size, config.num_experts, bias=False).weight
        self.register_buffer("expert_bias", self.weight.new_zeros(config.num_experts))

    def logits(self, x: Tensor) -> Tensor:
        """Logits of all experts, float32 [tokens, experts]."""
        return F.linear(x.float(), self.weight.float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert indices of states [tokens, width] and their weights, float32, both [tokens, count].

        The bias affects the choice of experts, not their weights.
        """
        scores = self.logits(x).sigmoid()
        biased = scores + self.expert_bias
        grouped = biased.view(len(x), self.groups, -1)
        best = highest(grouped.topk(2, dim=-1).values.sum(dim=-1), self.kept)
        out = grouped.new_ones(len(x), self.groups, dtype=torch.bool).scatter(1, best, False)
        chosen = highest(grouped.masked_fill(out[..., None], -float("inf")).flatten(1), self.count)
        weight = scores.gather(1, chosen)
        if self.count > 1:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weight * self.scale


class Mixture(nn.Module):
    """Routed experts of a layer, and one shared by all tokens."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(GatedMLP(width, inner) for _ in range(config.num_experts))
        self.shared_experts = GatedMLP(width, inner * config.num_shared_experts) if config.num_shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        out = mix(self.experts, x, *self.gate(x)).to(x.dtype)
        return out if self.shared_experts is None else out + self.shared_experts(x)


class LLaDA2Layer(Layer):
    """Layer with this family's module names."""

    attention_name: ClassVar[str] = "attention"


class LLaDA2(DecoderNetwork):
    """LLaDA2 with a language model head."""

    Config = LLaDA2Config
    config: LLaDA2Config
    embedding_name: ClassVar[str] = "word_embeddings"
    float32: ClassVar[tuple[str, ...]] = ("*.mlp.gate.expert_bias",)
    pattern = AttentionPattern(causal_block=BLOCK_LENGTH, judges_drawn=True, strict=True)
    block_length = BLOCK_LENGTH

    @classmethod
    def stacked(cls, config: LLaDA2Config, name: str) -> tuple[str, ...]:
        """Experts as stored by inclusionAI's training code: one stacked tensor per layer."""
        if found := re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.((?:gate|up|down)_proj)", name):
            return tuple(f"{found[1]}.{expert}.{found[2]}.weight" for expert in range(config.num_experts))
        return ()

    def make_layer(self, index: int) -> nn.Module:
        config = self.config
        dense = index < config.first_k_dense_replace
        mlp = GatedMLP(config.hidden_size, config.intermediate_size) if dense else Mixture(config)
        return LLaDA2Layer(config, FusedAttention(config), mlp)
