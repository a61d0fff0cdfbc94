"""Tiny random networks of the block-causal families, the same in transformers, and as a folder to serve."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from server.models.families.registry import ARCHITECTURES
from server.models.network import Network
from server.training.tokenizer import END, MASK
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

SDAR, SDAR_MOE, FAST_DLLM = "SDARForCausalLM", "SDARMoeForCausalLM", "Fast_dLLM_QwenForCausalLM"
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
OWN: dict[str, dict[str, Any]] = {
    SDAR: {"block_size": 4},
    SDAR_MOE: {"block_size": 4, **EXPERTS},
    FAST_DLLM: {"bd_size": 16},
}


def decoder_config(architecture: str, vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A `config.json` of two layers; mask is token 0, end-of-text token 1."""
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture].model_type,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "mask_token_id": 0,
        "eos_token_id": 1,
        **OWN[architecture],
        **({"head_dim": 12} if architecture != FAST_DLLM else {}),
        **changes,
    }


def decoder_network(config: dict[str, Any], seed: int = 0) -> Network:
    """Random weights whose confidences spread from below 0.1 to above 0.9."""
    family = ARCHITECTURES[config["architectures"][0]].network
    network = family(family.Config.model_validate(config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        scale = 1.5 * p.shape[-1] ** -0.5
        if name.endswith("embed_tokens.weight"):
            scale = 1.0
        elif name.endswith("lm_head.weight"):
            scale *= 2.0
        elif name.endswith("norm.weight"):
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
            continue
        p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return network.eval()


def block_mask(length: int, size: int) -> Tensor:
    """What is added to scores of attention, [1, 1, length, length]: nothing but between a block and a later one."""
    block = torch.arange(length) // size
    return torch.zeros(length, length).masked_fill(block[:, None] < block, -torch.inf)[None, None]


def in_transformers(network: Network) -> nn.Module:
    """The same network as transformers' Qwen2, Qwen3 or Qwen3-MoE: logits of tokens and an explicit mask."""
    from transformers import (
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    config = network.config
    values = config.model_dump(exclude={"rope_theta", "rope_scaling", "head_dim", "layer_types", "eos_token_id"})
    values |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    values |= {"attn_implementation": "sdpa"}
    name = type(network).__name__
    theirs: Any
    if name == "FastDLLM":
        theirs = Qwen2ForCausalLM(Qwen2Config(**values))
    elif name == "SDAR":
        theirs = Qwen3ForCausalLM(Qwen3Config(**values, head_dim=config.head_size))
    else:
        values["mlp_only_layers"] = list(values["mlp_only_layers"])
        theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**values, head_dim=config.head_size))
    missing, unexpected = theirs.load_state_dict(_joined(network.state_dict()), strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    made: nn.Module = theirs.eval().requires_grad_(False)
    return made


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts as transformers 5 has them: all of a layer in one tensor, gate and up in one."""
    joined: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, value in state.items():
        if ".experts." not in name:
            joined[name] = value
    for name, value in state.items():
        if ".experts." not in name:
            continue
        before, _, after = name.partition(".experts.")
        index, part, _ = after.split(".")
        if part == "gate_proj":
            value = torch.cat([value, state[f"{before}.experts.{index}.up_proj.weight"]])
        if part != "up_proj":
            kind = "gate_up_proj" if part == "gate_proj" else part
            experts.setdefault(f"{before}.experts.{kind}", []).append(value)
    return joined | {name: torch.stack(values) for name, values in experts.items()}


def write_decoder(folder: Path, architecture: str, seed: int = 0, **changes: Any) -> Path:
    """Write a servable model folder, whose tokenizer also knows `<|im_end|>`; `changes` go into its `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>"])
    config = decoder_config(architecture, tokenizer.get_vocab_size(), **changes)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "pad_token": END, "mask_token": MASK, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(decoder_network(config, seed).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder
