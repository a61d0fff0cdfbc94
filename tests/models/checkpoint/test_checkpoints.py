"""Checkpoints as people have them: what files repeat, leave out or call otherwise, and what is refused by name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from server.backends.loading import ModelError, load_model, load_network
from server.backends.torch.backend import TorchBackend
from server.models.network import Network
from tests.backends.test_loading import INDEX, LOAD_AND_MEASURE, WEIGHTS, edit_json, edit_weights, shard
from tests.commands.application import refused
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.tiny_dream import write_tiny_dream
from tests.tiny_gemma import write_tiny_gemma
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


# What files repeat or leave out.

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


# What configurations leave out or call otherwise.


@pytest.mark.parametrize("named", [True, False])
def test_the_type_that_inclusionais_training_code_writes(tmp_path: Path, named: bool) -> None:
    folder = write_model(tmp_path / "m", llada2_config())
    edit_json(folder / "config.json", model_type="llada2_moe_veomni")
    if not named:
        drop(folder / "config.json", "architectures")
    assert load_model(str(folder)).backend.info.architecture == "LLaDA2MoeModelLM"


def test_illadas_shape(tmp_path: Path) -> None:
    """Grouped queries and a tied head."""
    folder = write_tiny_model(tmp_path / "m", n_heads=4, n_kv_heads=2)
    tie(folder, "LLaDA")
    backend = load_model(str(folder), device="cpu", dtype="float32").backend
    assert isinstance(backend, TorchBackend) and list(backend.network.cache_shapes) == [(2, 8)] * 2


FAMILIES: dict[str, Write] = {name: write for name, (write, *_) in TIED.items()} | {
    "SDAR-MoE": lambda path: write_decoder(path, SDAR_MOE)
}
ROTATIONS: dict[str, Callable[[float], dict[str, Any]]] = {
    "scaling by type": lambda theta: {"rope_scaling": {"type": "default"}, "rope_theta": theta},
    "scaling by rope_type": lambda theta: {"rope_scaling": {"rope_type": "default"}, "rope_theta": theta},
    "scaling with theta": lambda theta: {"rope_scaling": {"rope_type": "default", "rope_theta": theta}},
    "parameters": lambda theta: {"rope_parameters": {"rope_type": "default", "rope_theta": theta}},
    "parameters without a type": lambda theta: {"rope_parameters": {"rope_theta": theta}},
    "parameters and scaling": lambda theta: {
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_scaling": None,
    },
    "by kind of layer": lambda theta: {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": theta}}
    },
    "empty": lambda theta: {"rope_parameters": {}, "rope_theta": theta},
}


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_rotation_however_it_is_written(tmp_path: Path, name: str, rotation: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    edit_json(folder / "config.json", rope_theta=777.0)
    expected = network_of(folder)(IDS)
    drop(folder / "config.json", "rope_theta", "rope_scaling")
    edit_json(folder / "config.json", **ROTATIONS[rotation](777.0))
    assert network_of(folder)(IDS).equal(expected)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_rotations_are_refused(tmp_path: Path, name: str, key: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    edit_json(folder / "config.json", **{key: {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}})
    assert f"{key} = {{'rope_type': 'yarn'" in line_of(folder)
    edit_json(folder / "config.json", **{key: {"rope_theta": 5.0}}, rope_theta=10000.0)
    assert f"rope_theta = 10000.0, but {key} says 5.0" in line_of(folder)


def test_a_part_of_each_head_may_be_said_in_rope_parameters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", llada2_config(partial_rotary_factor=0.25))
    expected = network_of(folder)(IDS)
    drop(folder / "config.json", "partial_rotary_factor", "rope_theta")
    edit_json(folder / "config.json", rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.25})
    assert network_of(folder)(IDS).equal(expected)


@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("name", ["Dream", "Fast-dLLM", "LLaDA2", "LLaDA-MoE", "SDAR", "SDAR-MoE"])
def test_heads_of_keys_are_those_of_queries_where_nothing_is_said(tmp_path: Path, name: str, null: bool) -> None:
    if name == "Dream":
        folder = write_tiny_dream(tmp_path / "m", hidden_act=None)
    elif name.startswith("LLaDA"):
        make = llada2_config if name == "LLaDA2" else llada_moe_config
        folder = write_model(tmp_path / "m", make(num_key_value_heads=4))
    else:
        architecture = {"Fast-dLLM": FAST_DLLM, "SDAR": SDAR, "SDAR-MoE": SDAR_MOE}[name]
        folder = write_decoder(tmp_path / "m", architecture, num_key_value_heads=4)
    if name == "Dream":
        edit_weights(folder, widen_keys)
        edit_json(folder / "config.json", num_key_value_heads=4)
    expected = network_of(folder)(IDS)
    drop(folder / "config.json", "num_key_value_heads")
    if null:
        edit_json(folder / "config.json", num_key_value_heads=None)
    assert network_of(folder)(IDS).equal(expected)


def widen_keys(tensors: dict[str, Tensor]) -> None:
    """Give each pair of heads that share keys and values its own."""
    for name, tensor in list(tensors.items()):
        if ".k_proj." in name or ".v_proj." in name:
            tensors[name] = tensor.view(2, 8, -1).repeat_interleave(2, dim=0).reshape(32, *tensor.shape[1:])


def defaults_of(name: str) -> dict[str, Any]:
    """What transformers' own class of that name fills in."""
    import transformers

    return dict(vars(getattr(transformers, name)()))


@pytest.mark.parametrize(
    ("name", "theirs", "keys"),
    [
        ("Dream", "Qwen2Config", ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act")),
        ("Fast-dLLM", "Qwen2Config", ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "hidden_act")),
        ("SDAR", "Qwen3Config", ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "attention_bias")),
        ("SDAR-MoE", "Qwen3MoeConfig", ("rms_norm_eps", "norm_topk_prob", "decoder_sparse_step")),
    ],
)
@pytest.mark.parametrize("null", [True, False])
def test_other_entries_default_to_what_transformers_takes(
    tmp_path: Path, name: str, theirs: str, keys: tuple[str, ...], null: bool
) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    drop(folder / "config.json", *keys)
    if null:
        edit_json(folder / "config.json", **dict.fromkeys(keys))
    config: Any = network_of(folder).config
    defaults = defaults_of(theirs)
    assert {key: getattr(config, key) for key in keys} == {key: defaults[key] for key in keys}


def test_sdars_heads_are_qwen3s_where_nothing_is_said(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m", SDAR, head_dim=128, num_attention_heads=2)
    drop(folder / "config.json", "head_dim")
    assert defaults_of("Qwen3Config")["head_dim"] == 128
    config: Any = network_of(folder).config
    assert config.head_size == 128


@pytest.mark.parametrize("null", [True, False])
def test_sdars_block_is_4_where_nothing_is_said(tmp_path: Path, null: bool) -> None:
    for architecture in (SDAR, SDAR_MOE):
        folder = write_decoder(tmp_path / architecture, architecture)
        drop(folder / "config.json", "block_size")
        if null:
            edit_json(folder / "config.json", block_size=None)
        info = load_model(str(folder)).backend.info
        assert info.block_length == 4 and info.pattern.causal_block == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_what_does_not_matter_may_be_there(tmp_path: Path, name: str) -> None:
    """Entries of any kind that newer or older programs add, numbers as floats, and no name of the architecture."""
    folder = FAMILIES[name](tmp_path / "m")
    expected = network_of(folder)(IDS)
    config = json.loads((folder / "config.json").read_text())
    whole = {key: float(value) for key, value in config.items() if type(value) is int and not key.endswith("token_id")}
    edit_json(
        folder / "config.json",
        **whole,
        torch_dtype="bfloat16",
        dtype="float16",
        auto_map={"AutoModel": "modeling_x.X"},
        transformers_version="5.99.0",
        id2label={"0": "x"},
        something={"new": [1, None]},
    )
    drop(folder / "config.json", "architectures")
    assert network_of(folder)(IDS).equal(expected)


def test_layers_with_a_window_are_refused_in_every_family(tmp_path: Path) -> None:
    for name in ("Dream", "SDAR", "Fast-dLLM"):
        folder = FAMILIES[name](tmp_path / name)
        edit_json(folder / "config.json", layer_types=["full_attention", "sliding_attention"])
        assert "layer_types with 'sliding_attention' is a variant that is not built" in line_of(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_layers": 10**9}, "n_layers: Input should be less than or equal to 1000"),
        ({"mlp_hidden_size": 10**18}, "config.json: "),
        ({"d_model": 2**62}, "config.json: "),
        ({"n_heads": 0}, "n_heads: Input should be greater than 0"),
        ({"rope_theta": -1}, "rope_theta: Input should be greater than 0"),
        ({"weight_tying": "perhaps"}, "weight_tying: "),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not an object"),
        ({"mask_token_id": "first"}, "mask_token_id is 'first', not a number"),
        ({"mask_token_id": [0]}, "mask_token_id is [0], not a number"),
    ],
)
def test_configurations_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_json(folder / "config.json", **changes)
    assert said in line_of(folder)


# Tokens that end a text.


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_may_be_in_generation_config_only(tmp_path: Path, name: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    drop(folder / "config.json", "eos_token_id", "pad_token_id")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    before = load_model(str(folder)).backend.info.end_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(str(folder)).backend.info.end_ids == before | {9} and 7 in before


@pytest.mark.parametrize("name", FAMILIES)
def test_ends_of_both_files_count(tmp_path: Path, name: str) -> None:
    folder = FAMILIES[name](tmp_path / "m")
    edit_json(folder / "config.json", eos_token_id=[7, 8])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_model(str(folder)).backend.info.end_ids >= {7, 8, 9}


def test_diffusion_gemmas_ends_may_be_at_the_top(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    edit_json(folder / "config.json", eos_token_id=[1, 6, 50])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 51]}))
    assert load_model(str(folder)).backend.info.end_ids == {1, 6, 50, 51}
    edit_json(folder / "config.json", eos_token_id=[1, 10**6])
    assert "eos_token_id = 1000000 is outside the vocabulary" in line_of(folder)


def test_the_tokenizers_end_counts_where_no_file_names_one(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    drop(folder / "config.json", "eos_token_id", "pad_token_id")
    assert load_model(str(folder)).backend.info.end_ids == {1}
    drop(folder / "tokenizer_config.json", "eos_token")
    assert load_model(str(folder)).backend.info.end_ids == frozenset()


# The mask token.


def with_tokens(folder: Path, *tokens: str) -> list[int]:
    """Add tokens to a folder's tokenizer and rows to its model; their ids."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(list(tokens))
    size = tokenizer.get_vocab_size()
    write_tiny_model(folder, vocab_size=size, embedding_size=size)
    tokenizer.save(str(folder / "tokenizer.json"))
    drop(folder / "config.json", "mask_token_id")
    return [tokenizer.token_to_id(token) for token in tokens]


def mask_of(folder: Path) -> int | None:
    return load_model(str(folder), device="cpu").backend.info.mask_id


def test_a_family_without_a_mask_token_does_not_mind_one_that_is_written_down(tmp_path: Path) -> None:
    """Gemma's tokenizers have one; transformers' class leaves the entry alone."""
    folder = write_tiny_gemma(tmp_path / "m")
    edit_json(folder / "config.json", mask_token_id=4)
    assert mask_of(folder) is None


def test_a_mask_token_among_the_models_own_is_declared_too(tmp_path: Path) -> None:
    """As transformers 5 writes names that not every model has."""
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    drop(folder / "tokenizer_config.json", "mask_token")
    edit_json(folder / "tokenizer_config.json", extra_special_tokens={"mask_token": "<hole>"})
    assert mask_of(folder) == hole


@pytest.mark.parametrize("kind", [["llada"], {"name": "llada"}, 3])
@pytest.mark.parametrize("experts", [None, 4])
def test_a_model_type_that_is_no_text(tmp_path: Path, kind: Any, experts: int | None) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_json(folder / "config.json", model_type=kind, num_experts=experts)
    assert line_of(folder) == f"{folder / 'config.json'}: model_type is {kind!r}, not a text"


def test_sizes_whose_product_is_no_number(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m", SDAR_MOE)
    edit_json(folder / "config.json", num_attention_heads=10**18)
    assert line_of(folder).startswith(f"{folder / 'config.json'}: ") and "\n" not in line_of(folder)


def test_a_null_in_one_file_leaves_the_other_its_word(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    edit_json(folder / "tokenizer_config.json", mask_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<hole>"}))
    assert mask_of(folder) == hole


@pytest.mark.parametrize("spelt", ["<hole>", {"content": "<hole>", "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_tokenizers_mask_token_counts_where_the_configuration_names_none(
    tmp_path: Path, file: str, spelt: Any
) -> None:
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    drop(folder / "tokenizer_config.json", "mask_token")
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {"mask_token": spelt}))
    assert mask_of(folder) == hole


def test_generation_config_may_name_the_mask(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hole, other = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": hole, "eos_token_id": 1}))
    edit_json(folder / "tokenizer_config.json", mask_token="<|mdm_mask|>")
    assert mask_of(folder) == hole, "a number that a program reads counts more than a token's name"
    edit_json(folder / "config.json", mask_token_id=other)
    assert mask_of(folder) == other


def test_a_tokenizer_that_contradicts_the_configuration_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    hole, _ = with_tokens(folder, "<hole>", "<|mdm_mask|>")
    edit_json(folder / "config.json", mask_token_id=hole)
    edit_json(folder / "tokenizer_config.json", mask_token="<hole>")
    with capture_logs() as said:
        assert mask_of(folder) == hole
    assert said == []
    edit_json(folder / "tokenizer_config.json", mask_token="<|mdm_mask|>")
    with capture_logs() as said:
        assert mask_of(folder) == hole
    assert ["the tokenizer declares another one" in each["event"] for each in said] == [True]


@pytest.mark.parametrize(
    ("write", "token"),
    [
        (lambda path: write_tiny_model(path), "<|mdm_mask|>"),
        (lambda path: write_model(path, llada2_config()), "<|mask|>"),
        (lambda path: write_model(path, llada_moe_config()), "<|mask|>"),
        (lambda path: write_decoder(path, SDAR), "<|MASK|>"),
        (lambda path: write_decoder(path, SDAR), "<MASK>"),
        (lambda path: write_decoder(path, SDAR_MOE), "<|MASK|>"),
        (lambda path: write_decoder(path, FAST_DLLM), "|<MASK>|"),
    ],
)
def test_the_familys_own_mask_token_is_known_by_its_name(tmp_path: Path, write: Write, token: str) -> None:
    """Here it has another id than the published one."""
    folder = write(tmp_path / "m")
    drop(folder / "config.json", "mask_token_id")
    drop(folder / "tokenizer_config.json", "mask_token")
    content = (folder / "tokenizer.json").read_text()
    known = json.loads(content)["added_tokens"][0]["content"]
    (folder / "tokenizer.json").write_text(content.replace(json.dumps(known), json.dumps(token)))
    assert mask_of(folder) == 0


def test_the_published_id_counts_only_where_the_tokenizer_has_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.models.families import registry

    folder = tmp_path / "m"
    masked, plain, word = with_tokens(folder, "[MASK]", "<blank>", "unmasked")
    drop(folder / "tokenizer_config.json", "mask_token")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<|mdm_mask|>", "<gone>"))
    family = registry.ARCHITECTURES["LLaDAModelLM"]
    for published, found in ((masked, masked), (plain, None), (word, None), (126336, None)):
        changed = type(family)(**(vars(family) | {"mask_token_id": published}))
        monkeypatch.setitem(registry.ARCHITECTURES, "LLaDAModelLM", changed)
        if found is not None:
            assert mask_of(folder) == found
        else:
            assert line_of(folder).endswith(
                "config.json: mask_token_id is not given, and the tokenizer neither declares a mask_token nor has "
                "<|mdm_mask|>"
            )


def test_a_declared_mask_outside_the_models_vocabulary(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"mask_token_id": 126336}))
    drop(folder / "config.json", "mask_token_id")
    assert "mask_token_id = 126336 is outside the vocabulary" in line_of(folder)


# Checkpoints of another kind.


@pytest.mark.parametrize(
    ("said", "method"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq, 4 bits"),
        ({"quant_method": "gptq", "bits": 8, "desc_act": False}, "gptq, 8 bits"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"something": 1}, "a method that is not named"),
    ],
)
def test_quantised_checkpoints_are_refused_by_method(tmp_path: Path, said: dict[str, Any], method: str) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_json(folder / "config.json", quantization_config=said)
    expected = f"{folder}: the checkpoint is quantised ({method}), which the torch engine does not support"
    assert line_of(folder) == line_of(folder, load_format="dummy") == expected


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq, 4 bits"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "awq, 4 bits"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
    ],
)
def test_older_quantised_checkpoints_have_a_file_of_their_own(
    tmp_path: Path, file: str, content: dict[str, Any], method: str
) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / file).write_text(json.dumps(content))
    assert f"quantised ({method})" in line_of(folder)


def test_what_mlx_writes_is_quantised(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_json(folder / "config.json", quantization={"group_size": 64, "bits": 4})
    assert "quantised (mlx, 4 bits)" in line_of(folder)


def test_diffusion_gemmas_text_model_may_be_quantised(tmp_path: Path) -> None:
    folder = write_tiny_gemma(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantised (fp8)" in line_of(folder)


LAYER = "model.transformer.blocks.0.q_proj"


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{LAYER}.qweight": torch.ones(4, 4).int(), f"{LAYER}.scales": torch.ones(4)},
        {f"{LAYER}.weight_scale_inv": torch.ones(4)},
        {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": torch.ones(4).to(torch.uint8)},
        {f"{LAYER}.weight_packed": torch.ones(4, 4).int()},
        {f"{LAYER}.weight": torch.ones(32, 32).to(torch.float8_e4m3fn)},
        {f"{LAYER}.weight": torch.ones(32, 32).to(torch.int8)},
        {f"{LAYER}.weight": torch.ones(32, 4).to(torch.uint32)},
        {f"{LAYER}.weight": torch.ones(32, 4).to(torch.int32)},
    ],
)
def test_quantised_tensors_are_told_even_where_no_configuration_says_so(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_tiny_model(tmp_path / "m")
    edit_weights(folder, lambda t: (t.pop(f"{LAYER}.weight"), t.update(tensors)))
    assert "quantised" in line_of(folder) and LAYER in line_of(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["expand_token_id", "delete_token_id"])
def test_dreamon_is_refused_by_name(tmp_path: Path, file: str, key: str) -> None:
    folder = write_tiny_dream(tmp_path / "m")
    edit_json(folder / file, **{key: 5})
    line = line_of(folder)
    assert "DreamOn" in line and key in line and str(folder) in line


def test_dreamon_is_known_by_its_tokens(tmp_path: Path) -> None:
    folder = write_tiny_dream(tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = settings["added_tokens_decoder"]
    last = max(map(int, added))
    added[str(last + 1)] = added[str(last)] | {"content": "<|expand|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "<|expand|> is DreamOn's" in line_of(folder)


# Folders and files that cannot be read.


def denied(error: Exception) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    return refuse


def link_to_nowhere(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def folder_in_its_place(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "config a folder": (lambda f: folder_in_its_place(f / "config.json"), "config.json: Is a directory"),
    "config a broken link": (lambda f: link_to_nowhere(f / "config.json"), "config.json: No such file or directory"),
    "config empty": (lambda f: (f / "config.json").write_text(" \n"), "config.json: the file is empty"),
    "config cut": (lambda f: (f / "config.json").write_text('{"architectures": ["LLa'), "config.json: not a JSON file"),
    "generation config a broken link": (
        lambda f: link_to_nowhere(f / "generation_config.json"),
        "generation_config.json: No such file or directory",
    ),
    "generation config a folder": (
        lambda f: folder_in_its_place(f / "generation_config.json"),
        "generation_config.json: Is a directory",
    ),
    "tokenizer settings a broken link": (
        lambda f: link_to_nowhere(f / "tokenizer_config.json"),
        "tokenizer_config.json: No such file or directory",
    ),
    "tokenizer settings no JSON": (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json: "),
    "tokenizer a folder": (lambda f: folder_in_its_place(f / "tokenizer.json"), "tokenizer.json: "),
    "tokenizer empty": (lambda f: (f / "tokenizer.json").write_bytes(b""), "tokenizer.json: "),
    "weights a folder": (lambda f: folder_in_its_place(f / WEIGHTS), f"{WEIGHTS}: Is a directory"),
    "weights a broken link": (lambda f: link_to_nowhere(f / WEIGHTS), f"{WEIGHTS}: no such file"),
    "weights cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:1000]),
        f"{WEIGHTS}: not a whole safetensors file",
    ),
    "index a folder": (lambda f: (shard(f), folder_in_its_place(f / INDEX)), f"{INDEX}: Is a directory"),
    "index cut": (lambda f: (shard(f), (f / INDEX).write_text('{"weight_map": {')), f"{INDEX}: not a JSON file"),
    "shards without an index": (
        lambda f: (f / WEIGHTS).rename(f / "model-00001-of-00002.safetensors"),
        f"{WEIGHTS}: no such file, and no {INDEX} for model-00001-of-00002.safetensors",
    ),
    "GGUF only": (
        lambda f: (f / WEIGHTS).rename(f / "model-Q4_K.gguf"),
        "model-Q4_K.gguf is not read, only safetensors",
    ),
    "nothing but GGUF": (
        lambda f: [path.unlink() if path.name != WEIGHTS else path.rename(f / "x.gguf") for path in f.iterdir()],
        "config.json: no such file; x.gguf is not read, only safetensors are",
    ),
    "pickle only": (
        lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is not read, only safetensors are",
    ),
    "another name": (
        lambda f: (f / WEIGHTS).rename(f / "consolidated.safetensors"),
        "consolidated.safetensors is not one of transformers' names",
    ),
    "an adapter": (
        lambda f: ((f / WEIGHTS).rename(f / "adapter_model.safetensors"), (f / "adapter_config.json").write_text("{}")),
        "adapter_config.json belongs to an adapter",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_folders_are_told_in_one_line(tmp_path: Path, name: str) -> None:
    destroy, message = UNREADABLE[name]
    folder = write_tiny_model(tmp_path / "m")
    destroy(folder)
    line = line_of(folder)
    assert message in line and str(folder) in line


def test_a_single_file_counts_more_than_an_index(tmp_path: Path) -> None:
    """As transformers has it; here the index is of shards that are no longer there."""
    folder = write_tiny_model(tmp_path / "m")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    network_of(folder)


NOWHERE = ["~nosuchuser/model", "a\0b", "x" * 5000, "/proc/self/mem/x"]


@pytest.mark.parametrize("model", NOWHERE)
def test_names_that_cannot_be_a_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


def test_a_link_that_leads_nowhere_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to("nowhere")
    assert line_of("model") == "model: a link that leads nowhere"


@pytest.mark.parametrize("call", ["iterdir", "is_dir"])
def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Tests may run as root, to whom nothing is forbidden."""
    folder = write_tiny_model(tmp_path / "m")
    monkeypatch.setattr(Path, call, denied(PermissionError(13, "Permission denied", str(folder))))
    assert line_of(folder) == f"{folder}: Permission denied"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", WEIGHTS])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, error: OSError
) -> None:
    folder = write_tiny_model(tmp_path / "m")
    (folder / "generation_config.json").write_text("{}")
    whole = os.open

    def guarded(path: Any, *args: Any, **options: Any) -> int:
        if Path(path).name == file:
            raise type(error)(error.errno, error.strerror, str(path))
        return whole(path, *args, **options)

    monkeypatch.setattr(os, "open", guarded)
    assert line_of(folder) == f"{folder / file}: {error.strerror}"


@pytest.mark.parametrize("command", [("generate", "a"), ("evaluate", "--task", "sort", "--sampler", "topk")])
def test_commands_end_with_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = write_tiny_model(tmp_path / "m")
    folder_in_its_place(folder / "config.json")
    said = refused(1, *command, "--model", folder)
    assert said == f"Error: {folder / 'config.json'}: Is a directory"


def test_files_that_may_be_listed_and_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is closed to root, so the system's answer is made up."""
    folder, look = write_tiny_model(tmp_path / "m"), Path.lstat

    def closed(path: Path) -> os.stat_result:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "lstat", closed)
    assert line_of(folder).endswith(": Permission denied")


@pytest.mark.parametrize("name", ["config a folder", "weights cut", "GGUF only"])
def test_serve_ends_with_one_line(tmp_path: Path, name: str) -> None:
    destroy, message = UNREADABLE[name]
    folder = write_tiny_model(tmp_path / "m")
    destroy(folder)
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(folder), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_limit_above_the_models_own_is_told(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    with capture_logs() as said:
        assert load_model(str(folder), max_model_len=9999).backend.info.max_length == 256
    assert ["--max-model-len" in each["event"] and each["limit"] for each in said] == [256]
    with capture_logs() as said:
        load_model(str(folder), max_model_len=256)
    assert said == []


def test_weights_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "m")
    errors = (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory\nof 1 EB"),
        MemoryError(),
    )
    for error in errors:
        monkeypatch.setattr("server.backends.loading.load_weights", denied(error))
        assert line_of(folder) == f"{folder}: the weights do not fit into the memory of cpu"
