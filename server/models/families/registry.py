"""Registry of architectures. A new one needs its own file and an entry here."""

from dataclasses import dataclass
from typing import Any

from server.models.families.diffusion_gemma import DiffusionGemma
from server.models.families.dream import Dream
from server.models.families.fast_dllm_v2 import FastDLLM
from server.models.families.llada import LLaDA
from server.models.families.llada2 import LLaDA2
from server.models.families.llada_moe import LLaDAMoE
from server.models.families.sdar import SDAR
from server.models.families.sdar_moe import SDARMoE
from server.models.network import Network


@dataclass(frozen=True)
class Family:
    """A supported architecture.

    Attributes:
        network: class of the network; `network.Config` validates `config.json`.
        model_type: the `model_type` of its configurations.
        end_tokens: names of end tokens in addition to the configuration's.
        experts: True if layers are mixtures of experts.
        mask_tokens: names of the mask token with its published id, for checkpoints that do not declare it; empty for a
            family without a mask token.
        other_types: other accepted values of `model_type`.
    """

    network: type[Network]
    model_type: str
    end_tokens: tuple[str, ...] = ()
    experts: bool = False
    mask_tokens: tuple[str, ...] = ()
    mask_token_id: int | None = None
    other_types: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Family] = {
    "LLaDAModelLM": Family(
        LLaDA, "llada", end_tokens=("<|eot_id|>",), mask_tokens=("<|mdm_mask|>",), mask_token_id=126336
    ),
    "LLaDAMoEModelLM": Family(
        LLaDAMoE,
        "lladamoe",
        end_tokens=("<|role_end|>",),
        experts=True,
        mask_tokens=("<|mask|>",),
        mask_token_id=156895,
    ),
    "LLaDA2MoeModelLM": Family(
        LLaDA2,
        "llada2_moe",
        end_tokens=("<|role_end|>",),
        experts=True,
        mask_tokens=("<|mask|>",),
        mask_token_id=156895,
        other_types=("llada2_moe_veomni",),  # written by inclusionAI's training code
    ),
    "DreamModel": Family(Dream, "Dream", end_tokens=("<|im_end|>",), mask_tokens=("<|mask|>",), mask_token_id=151666),
    "SDARForCausalLM": Family(
        SDAR, "sdar", end_tokens=("<|im_end|>",), mask_tokens=("<|MASK|>", "<MASK>"), mask_token_id=151669
    ),
    "SDARMoeForCausalLM": Family(
        SDARMoE,
        "sdar_moe",
        end_tokens=("<|im_end|>",),
        experts=True,
        mask_tokens=("<|MASK|>", "<MASK>"),
        mask_token_id=151669,
    ),
    "Fast_dLLM_QwenForCausalLM": Family(
        FastDLLM,
        "Fast_dLLM_Qwen",
        end_tokens=("<|im_end|>",),
        mask_tokens=("|<MASK>|",),
        mask_token_id=151665,
    ),
    "DiffusionGemmaForBlockDiffusion": Family(DiffusionGemma, "diffusion_gemma"),
}
EARLY_LLADA_MOE = {
    (name, kind)
    for name in ("LLaDAModelLM", "LLaDAMoEModel", "LLaDAMoEModelLM")
    for kind in ("llada", "lladamoe", None)
}
"""Architecture names and model types of mixtures of experts: early checkpoints carry the dense model's."""


def find_family(config: dict[str, Any]) -> tuple[str, Family]:
    """Name and family of the architecture in a `config.json`. Raises ValueError if it is not supported."""
    supported = ", ".join(ARCHITECTURES)
    names, model_type = config.get("architectures"), config.get("model_type")
    if not isinstance(model_type, str | None):
        raise ValueError(f"model_type is {model_type!r}, not a text")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        names = [
            name for name, family in ARCHITECTURES.items() if model_type in (family.model_type, *family.other_types)
        ]
        if not names:
            raise ValueError(f"names no architecture; supported: {supported}")
    name = names[0]
    if config.get("num_experts") and (name, model_type) in EARLY_LLADA_MOE:
        return "LLaDAMoEModelLM", ARCHITECTURES["LLaDAMoEModelLM"]
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is not supported; supported: {supported}")
    family = ARCHITECTURES[name]
    if config.get("num_experts") and not family.experts:
        raise ValueError(f"architecture {name!r} with experts (num_experts = {config['num_experts']}) is not supported")
    if model_type not in (None, family.model_type, *family.other_types):
        raise ValueError(f"model_type {model_type!r} is not supported for architecture {name!r}")
    return name, family
