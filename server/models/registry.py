"""Which class builds which architecture. A new one is a file and a line here."""

from dataclasses import dataclass
from typing import Any

from server.models.dream import Dream
from server.models.llada import LLaDA
from server.models.network import Network
from server.models.sdar import SDAR


@dataclass(frozen=True)
class Family:
    """An architecture that we build.

    Attributes:
        network: its class; `network.Config` validates `config.json`.
        model_type: the `model_type` of its configurations.
        end_tokens: names of tokens that end a text beside those that the configuration gives.
    """

    network: type[Network]
    model_type: str
    end_tokens: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Family] = {
    "LLaDAModelLM": Family(LLaDA, "llada", end_tokens=("<|eot_id|>",)),
    "DreamModel": Family(Dream, "Dream", end_tokens=("<|im_end|>",)),
    "SDARForCausalLM": Family(SDAR, "sdar", end_tokens=("<|im_end|>",)),
}


def find_family(config: dict[str, Any]) -> tuple[str, Family]:
    """Name and family of the architecture that a `config.json` asks for. Raises ValueError if it is not built."""
    supported = ", ".join(ARCHITECTURES)
    names, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        names = [name for name, family in ARCHITECTURES.items() if family.model_type == model_type]
        if not names:
            raise ValueError(f"names no architecture; supported: {supported}")
    name = names[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not supported; supported: {supported}")
    family = ARCHITECTURES[name]
    # Early LLaDA-MoE configurations carry the dense model's architecture name.
    if config.get("num_experts"):
        raise ValueError(f"architecture {name!r} with experts (num_experts = {config['num_experts']}) is not supported")
    if model_type not in (None, family.model_type):
        raise ValueError(f"model_type {model_type!r} is not supported for architecture {name!r}")
    return name, family
