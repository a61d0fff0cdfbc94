"""A tiny random LLaDA checkpoint, written as a Hugging Face folder: what tests serve."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from server.models.families.llada import LLaDA, LLaDAConfig
from server.training.tokenizer import END, MASK, build_tokenizer

TEXTS = ["Tom has 3 apples. He buys 5 more. How many apples does Tom have now? Then the answer is so: #### 8"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Bytes, numbers to 99 and a dozen words: any text encodes."""
    return build_tokenizer(TEXTS)


def tiny_config(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """A `config.json` of two layers; mask is token 0, end-of-text token 1."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "mlp_hidden_size": 48,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "max_sequence_length": 256,
        "rope_theta": 10000.0,
        "mask_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    } | changes


def tiny_network(config: dict[str, Any], seed: int = 0, end_bias: float = 0.0) -> LLaDA:
    """Random weights whose confidences spread from below 0.1 to above 0.9.

    `end_bias` is added to the logit of end-of-text, more or less: with 0 a generation hardly ever ends early, with 10
    most do.
    """
    network = LLaDA(LLaDAConfig.model_validate(config)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        if p.dim() == 2:
            embedding = name.endswith("wte.weight")
            p.copy_(torch.randn(p.shape, generator=generator) * (1.0 if embedding else 1.5 * p.shape[1] ** -0.5))
    # One feature is alike at all positions, so that the head's weight on it is a bias.
    network.transformer.wte.weight[:, 0] = 3.0
    head = network.transformer.ff_out.weight
    head *= 2.0
    head[:, 0] = 0.0
    for end in network.config.end_ids:
        head[end, 0] = end_bias / 2.0
    return network.eval()


def write_tiny_model(
    folder: Path, seed: int = 0, end_bias: float = 0.0, chat_template: str | None = CHAT_TEMPLATE, **changes: Any
) -> Path:
    """Write a servable model folder; `changes` go into its `config.json`. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size()) | changes
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END, "pad_token": END, "mask_token": MASK}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tiny_network(config, seed, end_bias).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder
