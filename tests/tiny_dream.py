"""A tiny random Dream checkpoint with the files that Dream's have: a slow tokenizer, and no `tokenizer.json`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from server.models.families.dream import Dream, DreamConfig

TEXTS = ["Tom has 3 apples. He buys 5 more. How many apples does Tom have now? Then the answer is so: #### 8"] * 3
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_dream_config(vocab_size: int = 90, **changes: Any) -> dict[str, Any]:
    """A `config.json` of two layers whose heads of queries share those of keys."""
    return {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 256,
        "max_window_layers": 28,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "mask_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    } | changes


def tiny_dream(config: dict[str, Any], seed: int = 0, scale: float = 3.0) -> Dream:
    """Random weights, those of norms and biases too; `scale` makes the model sure of itself."""
    network = Dream(DreamConfig.model_validate(config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        draw = torch.randn(p.shape, generator=generator)
        if p.dim() == 2:
            p.copy_(draw if "embed" in name else draw * 1.5 * p.shape[1] ** -0.5)
        else:
            p.copy_(draw * 0.3 + name.endswith("norm.weight"))
    network.model.norm.weight.mul_(scale)
    return network.eval()


def write_tokenizer(folder: Path, **settings: Any) -> int:
    """Write a small byte-level tokenizer as `vocab.json`, `merges.txt` and settings; returns the number of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.model.save(str(folder))
    size = tokenizer.get_vocab_size()
    added = {
        str(size + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(ADDED)
    }
    content = {
        "added_tokens_decoder": added,
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": CHATML,
        "tokenizer_class": "DreamTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(content | settings))
    return size + len(ADDED)


def write_tiny_dream(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a servable folder; `changes` go into its `config.json`, where None takes an entry away."""
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder)
    # As in the published ones there are rows that no token has.
    config = tiny_dream_config(size + 3, mask_token_id=size - 1, eos_token_id=size - 5, pad_token_id=size - 5)
    network = tiny_dream(config, seed)
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": size - 5, "mask_token_id": None}))
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder
