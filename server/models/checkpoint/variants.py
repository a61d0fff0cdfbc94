"""Detection of checkpoints that resemble a supported family: quantised ones, and DreamOn's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from server.models.files import ModelError, read_json, read_optional_json
from server.models.text.codec import TextCodec

GROWING = ("expand_token_id", "delete_token_id")
GROWING_TOKENS = ("<|expand|>", "<|delete|>")
"""Keys of DreamOn's configurations, and its tokens, for canvases of variable length."""

PARTS = (
    *(".qweight", ".qzeros", ".scales", ".g_idx"),  # GPTQ, AWQ
    *(".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale"),  # FP8, NVFP4
    *(".weight_packed", ".weight_shape", ".weight_zero_point"),  # compressed-tensors
    *(".absmax", ".quant_map", ".SCB"),  # bitsandbytes
)
"""Suffixes of tensor names of quantised layers."""


def refuse_growing_canvases(folder: Path, sources: Iterable[dict[str, Any]], text: TextCodec | None) -> None:
    """Raise ModelError for a checkpoint of DreamOn's kind, recognised by its configurations or tokenizer."""
    marks = [key for source in sources for key in GROWING if source.get(key) is not None]
    if text is not None:
        marks += [token for token in GROWING_TOKENS if text.token_id(token) is not None]
    if marks:
        raise ModelError(f"{folder}: {marks[0]} is DreamOn's, whose canvas grows and shrinks: it is not supported")


def quantised_by(folder: Path) -> str | None:
    """Quantisation method that the configurations name; None if there is none. Raises ModelError."""
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    for source in (config, text if isinstance(text, dict) else {}):
        if (said := source.get("quantization_config")) or (said := source.get("compression_config")):
            return _method(said)
        if said := source.get("quantization"):
            return _method({"format": "mlx", **said} if isinstance(said, dict) else said)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        if said := read_optional_json(folder / name):
            return _method(said)
    return None


def _method(said: Any) -> str:
    """Name of an entry's method, with its bits if given."""
    if not isinstance(said, dict):
        return str(said)
    if isinstance(said.get("quantization"), dict):  # in NVIDIA's exports
        said = said["quantization"]
    name = next((str(said[key]) for key in ("quant_method", "quant_algo", "format") if said.get(key)), None)
    bits = [str(said[key]) for key in ("bits", "w_bit") if isinstance(said.get(key), int)]
    bits += [number for number in ("4", "8") if said.get(f"load_in_{number}bit") or said.get(f"_load_in_{number}bit")]
    if name is None:  # older files are recognised by a key that only the method has
        marks = {"w_bit": "awq", "desc_act": "gptq", "load_in_8bit": "bitsandbytes", "load_in_4bit": "bitsandbytes"}
        name = next((method for mark, method in marks.items() if mark in said), "a method that is not named")
    return f"{name}, {bits[0]} bits" if bits else name


def looks_quantised(name: str) -> bool:
    """True if a tensor's name belongs to a quantised layer."""
    return name.endswith(PARTS) or ".quant_state." in name
