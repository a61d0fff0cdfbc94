"""Tiny random checkpoints of the families with experts."""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from server.models.decoder import DecoderNetwork
from server.models.families.llada2 import LLaDA2, LLaDA2Config
from server.models.families.llada_moe import LLaDAMoE, LLaDAMoEConfig
from tests.tiny import tiny_tokenizer

SHARED = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 90,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 10000.0,
    "mask_token_id": 0,
    "eos_token_id": 1,
}
N = TypeVar("N", bound=DecoderNetwork)
ROLE_END = "<|role_end|>"
CHAT_TEMPLATE = (
    "<role>SYSTEM</role>detailed thinking off<|role_end|>{% for message in messages %}<role>HUMAN</role>"
    "{{ message['content'] }}<|role_end|>{% endfor %}<role>ASSISTANT</role>"
)


def llada2_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` of three layers, the first one dense; mask is token 0, end-of-text token 1."""
    family = {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "use_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    }
    return SHARED | family | changes


def llada_moe_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` of two layers."""
    family = {
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "lladamoe",
        "dense_intermediate_size": 48,
        "expert_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "moe_layer_freq": [1, 1],
        "qk_layernorm": True,
        "partial_rotary_factor": 1,
    }
    return SHARED | family | changes


def llada2(seed: int = 0, **changes: Any) -> LLaDA2:
    network = LLaDA2(LLaDA2Config.model_validate(llada2_config(**changes)))
    return randomise(network, seed)


def llada_moe(seed: int = 0, **changes: Any) -> LLaDAMoE:
    network = LLaDAMoE(LLaDAMoEConfig.model_validate(llada_moe_config(**changes)))
    return randomise(network, seed)


def randomise(network: N, seed: int) -> N:
    """Random weights whose confidences spread, and whose routers' biases are as large as differences of scores."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.requires_grad_(False).state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if name.endswith("expert_bias"):
            tensor.copy_(drawn * 0.2)
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.1 * drawn)
        elif name == f"model.{network.embedding_name}.weight":
            tensor.copy_(drawn)
        else:
            tensor.copy_(drawn * (3.0 if name == "lm_head.weight" else 1.5) * tensor.shape[1] ** -0.5)
    return network.eval()


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write a servable folder of either family, with a tokenizer and a chat template. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens([ROLE_END])
    config = config | {"vocab_size": tokenizer.get_vocab_size()}
    network: DecoderNetwork
    if config["model_type"] == "llada2_moe":
        network = LLaDA2(LLaDA2Config.model_validate(config))
    else:
        network = LLaDAMoE(LLaDAMoEConfig.model_validate(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(randomise(network, seed).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder
