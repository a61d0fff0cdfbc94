"""Models under measurement, with prompts of equal length."""

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from policies.tasks import get_task
from server.backends.loading import EMBEDDED_NAME, describe, find_model, load_model, load_network
from server.backends.torch.backend import TorchBackend
from server.models.checkpoint.packing import pack_linear_layers
from server.models.families.llada import LLaDA, LLaDAConfig

RANDOM_NAME = "random-100m"
RANDOM = {
    "d_model": 640,
    "n_layers": 10,
    "n_heads": 10,
    "mlp_hidden_size": 2048,
    "vocab_size": 32_000,
    "embedding_size": 32_000,
    "max_sequence_length": 4096,
    "mask_token_id": 31_999,
    "eos_token_id": 31_998,
}


@dataclass(frozen=True)
class BenchModel:
    """A model under measurement.

    Attributes:
        plain: the same weights in plain layers, as a script would run them.
        prompts: token ids, one entry per concurrent request, all of equal length.
        ends: similar prompts whose answers end before `gen_length`; empty if the model has no end-of-text.
        gen_length, block_length, steps: settings of the generations.
    """

    name: str
    backend: TorchBackend
    plain: LLaDA
    prompts: list[list[int]]
    ends: list[list[int]]
    gen_length: int
    block_length: int
    steps: int


def embedded(count: int) -> BenchModel:
    """The embedded model with word problems, and with short sums that end early."""
    loaded = load_model(None, device="cpu", dtype="float32")
    assert isinstance(loaded.backend, TorchBackend)
    _, _, plain = load_network(find_model(None)[1], torch.device("cpu"), torch.float32)
    assert isinstance(plain, LLaDA)

    def prompts(task: str) -> list[list[int]]:
        """Prompts of the most frequent length."""
        found: dict[int, list[list[int]]] = {}
        for problem in get_task(task).problems(40 * count, 0, "train"):
            ids = loaded.text.encode(problem.prompt)
            found.setdefault(len(ids), []).append(ids)
            if len(found[len(ids)]) == count:
                return found[len(ids)]
        raise ValueError(f"too few problems of {task} of one length")

    return BenchModel(EMBEDDED_NAME, loaded.backend, plain, prompts("chain"), prompts("totals"), 64, 64, 32)


def random_network(config: dict[str, Any]) -> LLaDA:
    """A network with random weights in the shape of a configuration."""
    torch.manual_seed(0)
    network = LLaDA(LLaDAConfig.model_validate(config)).requires_grad_(False).eval()
    for weight in network.parameters():
        if weight.dim() == 2:
            weight.data.normal_(std=weight.shape[1] ** -0.5)
    return network


def random_model(count: int) -> BenchModel:
    """A model of about 100 M random weights and a vocabulary of 32,000, since a tiny model hides costs."""
    plain = random_network(RANDOM)
    info = describe("LLaDAModelLM", plain)
    network = deepcopy(plain)
    pack_linear_layers(network)
    prompts = torch.randint(31_000, (count, 32), generator=torch.Generator().manual_seed(1)).tolist()
    return BenchModel(RANDOM_NAME, TorchBackend(network, info), plain, prompts, [], 32, 32, 8)


def write_random_model(subject: BenchModel, folder: Path) -> None:
    """Write the random model as a folder that a server can load, with the embedded model's tokenizer."""
    _, source = find_model(None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    config = {"architectures": [subject.backend.info.architecture], "model_type": "llada", **RANDOM}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(subject.plain.state_dict(), folder / "model.safetensors")
