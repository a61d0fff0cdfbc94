"""A tiny random DiffusionGemma checkpoint, written as a Hugging Face folder: what tests serve."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from server.models.families.diffusion_gemma import DiffusionGemma, DiffusionGemmaConfig
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

WINDOW, CANVAS = 6, 8


def tiny_gemma_config(vocab_size: int, **text: Any) -> dict[str, Any]:
    """A `config.json` of three layers, the last of which sees everything; `text` goes into its `text_config`."""
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": CANVAS,
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "top_k_experts": 2,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}},
            "sliding_window": WINDOW,
            "vocab_size": vocab_size,
            "max_position_embeddings": 128,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            },
            "rms_norm_eps": 1e-6,
            "eos_token_id": 1,
        }
        | text,
    }


def tiny_gemma(config: dict[str, Any], seed: int = 0) -> DiffusionGemma:
    """Random weights whose confidences spread; what was said before counts, and so does which way a layer reads."""
    network = DiffusionGemma(DiffusionGemmaConfig.model_validate(config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*network.named_parameters(), *network.named_buffers()]:
        if p.dim() > 1:
            scale = 1.0 if name.endswith("embed_tokens.weight") else 1.2 * p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        else:
            p.copy_(0.7 + 0.6 * torch.rand(p.shape, generator=generator))
    network.decoder.norm.weight.mul_(0.8)
    return network.eval()


def write_tiny_gemma(folder: Path, seed: int = 0, **text: Any) -> Path:
    """Write a servable model folder, with a tensor of a vision tower; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = tiny_gemma_config(tokenizer.get_vocab_size(), **text)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in tiny_gemma(config, seed).state_dict().items()}
    tensors["model.encoder.vision_tower.patch_embedder.input_proj.weight"] = torch.ones(2, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
