"""Variants refused by name: quantised checkpoints and DreamOn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.test_loading import edit_json, edit_weights
from tests.models.checkpoint.folders import line_of
from tests.tiny import write_tiny_model
from tests.tiny_dream import write_tiny_dream
from tests.tiny_gemma import write_tiny_gemma


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
