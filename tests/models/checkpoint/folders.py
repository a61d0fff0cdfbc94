"""Helpers for tests of checkpoint folders: writers by family, edits of files, loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.backends.loading import ModelError, load_model, load_network
from server.models.network import Network
from tests.backends.test_loading import edit_json, edit_weights
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.tiny import write_tiny_model
from tests.tiny_dream import write_tiny_dream
from tests.tiny_moe import llada2_config, llada_moe_config, write_model

CPU = torch.device("cpu")

IDS = torch.arange(2, 60)[None]


def network_of(folder: Path) -> Network:
    return load_network(folder, CPU, torch.float32)[2]


def drop(path: Path, *keys: str) -> None:
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in keys}))


def line_of(folder: Path | str, **options: Any) -> str:
    """Why it is refused, in one line."""
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), device="cpu", **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


Write = Callable[[Path], Path]

TIED: dict[str, tuple[Write, str, str]] = {
    "LLaDA": (
        lambda path: write_tiny_model(path, weight_tying=False),
        "model.transformer.ff_out.weight",
        "model.transformer.wte.weight",
    ),
    "Dream": (write_tiny_dream, "lm_head.weight", "model.embed_tokens.weight"),
    "SDAR": (lambda path: write_decoder(path, SDAR), "lm_head.weight", "model.embed_tokens.weight"),
    "Fast-dLLM": (lambda path: write_decoder(path, FAST_DLLM), "lm_head.weight", "model.embed_tokens.weight"),
    "LLaDA2": (lambda path: write_model(path, llada2_config()), "lm_head.weight", "model.word_embeddings.weight"),
    "LLaDA-MoE": (lambda path: write_model(path, llada_moe_config()), "lm_head.weight", "model.embed_tokens.weight"),
}


def tie(folder: Path, name: str) -> Tensor:
    """Say that the head is the embedding, and store it as such; logits of the same without tying."""
    head, embedding = TIED[name][1:]
    edit_weights(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    expected = network_of(folder)(IDS)
    edit_json(folder / "config.json", tie_word_embeddings=True, weight_tying=True)
    return expected


FAMILIES: dict[str, Write] = {name: write for name, (write, *_) in TIED.items()} | {
    "SDAR-MoE": lambda path: write_decoder(path, SDAR_MOE)
}
