"""Parsing of `config.json` for vLLM with our own classes, registered with vLLM under `CONFIG_FORMAT`."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from transformers import PreTrainedConfig
from vllm.transformers_utils.config import register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from server.backends.vllm.names import CONFIG_FORMAT
from server.models.families.registry import find_family
from server.models.files import read_json
from server.models.network import Network

SHAPE = {
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": ("intermediate_size", "mlp_width"),
    "num_hidden_layers": ("num_hidden_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_dim": ("head_size", "head_dim"),
    "max_position_embeddings": ("max_length",),
    "vocab_size": ("rows",),
    "tie_word_embeddings": ("tie_word_embeddings", "weight_tying"),
}
"""vLLM's names of shape parameters, and our attributes, of which the first that exists is used."""


@register_config_parser(CONFIG_FORMAT)
class ConfigParser(ConfigParserBase):
    """Gives vLLM the model's shape under its own names, and our models the whole file."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        source = read_json(Path(model) / "config.json")
        architecture, _, parsed = parse(source)
        shape = {
            name: next(getattr(parsed, ours) for ours in names if hasattr(parsed, ours))
            for name, names in SHAPE.items()
        }
        # Keep our own model type: vLLM would interpret more of a type it knows.
        quantization = {name: source[name] for name in ("quantization_config",) if name in source}
        config = PreTrainedConfig(
            architectures=[architecture], torch_dtype=source.get("torch_dtype"), source=source, **shape, **quantization
        )
        return config.to_dict(), config


def parse(source: dict[str, Any]) -> tuple[str, type[Network], BaseModel]:
    """Architecture, our network class and configuration of a `config.json`. Raises ValueError."""
    architecture, family = find_family(source)
    # The mask token is handled by the engine, which may know it from the tokenizer only; any id will do here.
    settings = {"mask_token_id": 0} if source.get("mask_token_id") is None else {}
    return architecture, family.network, family.network.Config.model_validate(source | settings)
