"""Configurations: default values, alternative spellings, unsupported and invalid entries."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from torch import Tensor

from server.backends.loading import load_model
from server.backends.torch.backend import TorchBackend
from tests.backends.test_loading import edit_json, edit_weights
from tests.decoders import FAST_DLLM, SDAR, SDAR_MOE, write_decoder
from tests.models.checkpoint.folders import FAMILIES, IDS, drop, line_of, network_of, tie
from tests.tiny import write_tiny_model
from tests.tiny_dream import write_tiny_dream
from tests.tiny_moe import llada2_config, llada_moe_config, write_model


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


def test_a_limit_above_the_models_own_is_told(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    with capture_logs() as said:
        assert load_model(str(folder), max_model_len=9999).backend.info.max_length == 256
    assert ["--max-model-len" in each["event"] and each["limit"] for each in said] == [256]
    with capture_logs() as said:
        load_model(str(folder), max_model_len=256)
    assert said == []
