"""Stored tensors: copies of shared ones, stacked experts, buffers that are ignored."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.backends.test_loading import LOAD_AND_MEASURE, WEIGHTS, edit_json, edit_weights, shard
from tests.models.checkpoint.folders import IDS, TIED, line_of, network_of, tie
from tests.tiny import write_tiny_model
from tests.tiny_dream import write_tiny_dream
from tests.tiny_gemma import write_tiny_gemma
from tests.tiny_moe import llada2_config, write_model


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", ["both", "embedding", "head"])
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_may_be_stored_once_or_twice(tmp_path: Path, name: str, stored: str, sharded: bool) -> None:
    folder = TIED[name][0](tmp_path / "m")
    expected = tie(folder, name)
    if stored != "both":
        left_out = TIED[name][1 if stored == "embedding" else 2]
        edit_weights(folder, lambda tensors: tensors.pop(left_out))
    if sharded:
        shard(folder)
    network = network_of(folder)
    assert network(IDS).equal(expected)
    assert TIED[name][1] not in network.state_dict()


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_from_the_embedding_it_is_said_to_be(tmp_path: Path, name: str) -> None:
    """In one number, the last one."""
    folder = TIED[name][0](tmp_path / "m")
    tie(folder, name)
    head, embedding = TIED[name][1:]
    edit_weights(folder, lambda tensors: tensors[head][-1].index_fill_(0, torch.tensor([-1]), 7.0))
    line = line_of(folder)
    assert head in line and embedding in line and "differs" in line and str(folder) in line


def test_copies_of_another_number_type_are_the_same_if_their_numbers_are(tmp_path: Path) -> None:
    folder = TIED["Dream"][0](tmp_path / "m")
    tie(folder, "Dream")
    embedding = "model.embed_tokens.weight"
    edit_weights(folder, lambda t: t.update({embedding: t[embedding].bfloat16(), "lm_head.weight": t[embedding]}))
    assert "lm_head.weight differs from model.embed_tokens.weight" in line_of(folder)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t[embedding].float()}))
    network_of(folder)


def test_a_head_of_its_own_is_no_copy(tmp_path: Path) -> None:
    folder = write_tiny_dream(tmp_path / "m")
    edit_weights(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "tensor lm_head.weight missing" in line_of(folder)


BUFFERS = {
    "LLaDA": "model.transformer.blocks.0.rotary_emb.inv_freq",
    "Dream": "model.rotary_emb.inv_freq",
    "SDAR": "model.layers.1.self_attn.rotary_emb.inv_freq",
    "Fast-dLLM": "model.rotary_emb.original_inv_freq",
    "LLaDA2": "model.rotary_emb.inv_freq",
    "LLaDA-MoE": "model.layers.0.self_attn.rotary_emb.inv_freq",
}


@pytest.mark.parametrize("name", BUFFERS)
def test_known_buffers_are_left_out(tmp_path: Path, name: str) -> None:
    folder = TIED[name][0](tmp_path / "m")
    expected = network_of(folder)(IDS)
    edit_weights(folder, lambda tensors: tensors.update({BUFFERS[name]: torch.ones(4)}))
    assert network_of(folder)(IDS).equal(expected)


ENCODER, DECODER = "model.encoder.language_model.", "model.decoder."


def encoder_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What transformers' encoder shares with its decoder."""
    return {
        ENCODER + name.removeprefix(DECODER): value.clone()
        for name, value in tensors.items()
        if name.startswith(DECODER) and "self_conditioning" not in name and not name.endswith("layer_scalar")
    }


def gemma_state(folder: Path) -> dict[str, Tensor]:
    return network_of(folder).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_diffusion_gemma_with_all_its_copies(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    expected = gemma_state(folder)
    head = "model.decoder.embed_tokens.weight"
    edit_weights(folder, lambda t: t.update(encoder_copies(t), **{"lm_head.weight": t[head].clone()}))
    edit_weights(folder, lambda t: t.update({"model.decoder.embed_tokens.embed_scale": torch.ones(())}))
    edit_weights(folder, lambda t: t.update({"model.decoder.rotary_emb.full_attention_inv_freq": torch.ones(4)}))
    assert same(gemma_state(folder), expected)


def test_diffusion_gemma_with_the_encoders_tensors_in_place_of_the_decoders(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    expected = gemma_state(folder)

    def only_encoder(tensors: dict[str, Tensor]) -> None:
        copies = encoder_copies(tensors)
        for name in copies:
            tensors.pop(DECODER + name.removeprefix(ENCODER))
        tensors.update(copies)

    edit_weights(folder, only_encoder)
    assert same(gemma_state(folder), expected)


@pytest.mark.parametrize(
    "name",
    [
        "embed_tokens.weight",
        "norm.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.0.router.scale",
        "layers.0.router.per_expert_scale",
        "layers.2.experts.gate_up_proj",
    ],
)
def test_a_copy_of_diffusion_gemmas_encoder_that_differs(tmp_path: Path, name: str) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    edit_weights(folder, lambda t: t.update(encoder_copies(t)))
    edit_weights(folder, lambda t: t[ENCODER + name].add_(1e-3))
    line = line_of(folder)
    assert ENCODER + name in line and DECODER + name in line and "differs" in line


def test_an_export_without_the_encoders_factors_has_the_decoders(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    factors = [f"{ENCODER}layers.{i}.layer_scalar" for i in range(3)]
    edit_weights(folder, lambda t: [t.pop(name) for name in factors])
    state = gemma_state(folder)
    assert all(state[name].equal(state[DECODER + name.removeprefix(ENCODER)]) for name in factors)
    assert len({float(state[name]) for name in factors}) == 3, "they are not all 1"


def test_experts_in_one_tensor_as_they_are_trained(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", llada2_config())
    expected = network_of(folder)(IDS)

    def stack(tensors: dict[str, Tensor]) -> None:
        for layer in (1, 2):
            for part in ("gate_proj", "up_proj", "down_proj"):
                at = f"model.layers.{layer}.mlp.experts"
                tensors[f"{at}.{part}"] = torch.stack([tensors.pop(f"{at}.{e}.{part}.weight") for e in range(8)])

    edit_weights(folder, stack)
    edit_json(folder / "config.json", model_type="llada2_moe_veomni")
    assert network_of(folder)(IDS).equal(expected)
    name = "model.layers.1.mlp.experts.up_proj"
    edit_weights(folder, lambda t: t.update({name: t[name][:7].clone()}))
    assert f"{name} has shape [7, 16, 32], but config.json says [8, 16, 32]" in line_of(folder)


def test_holding_copies_against_each_other_takes_little_memory(tmp_path: Path) -> None:
    shape = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 64, "embedding_size": 400_000}
    folder = write_tiny_model(tmp_path / "m", weight_tying=False, **shape)
    head, embedding = TIED["LLaDA"][1:]
    edit_json(folder / "config.json", weight_tying=True)

    def grown() -> int:
        command = [sys.executable, "-c", LOAD_AND_MEASURE, str(folder), "auto"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
        return int(done.stdout.split()[0])

    edit_weights(folder, lambda tensors: tensors.pop(head))
    alone, size = grown(), (folder / WEIGHTS).stat().st_size
    assert size > 100_000_000
    edit_weights(folder, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    assert grown() < alone + 0.3 * size
