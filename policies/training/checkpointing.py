"""State of a training run between two sessions: one safetensors file."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from policies.files.atomic import write_file
from policies.files.regular import check_safetensors
from policies.network.policy_network import UnmaskingPolicy
from policies.training.recipe import PolicyRecipe


@dataclass
class RunState:
    """Weights of policy and reference, the optimizer's moments, and JSON values, `numbers["stage"]` among them."""

    network: UnmaskingPolicy
    reference: UnmaskingPolicy | None
    optimizer: torch.optim.AdamW | None
    numbers: dict[str, Any]

    def save(self, path: Path, recipe: PolicyRecipe) -> None:
        """Write it; a kill at any point leaves the old file or the new one."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.reference is not None:
            tensors |= {f"reference.{name}": value for name, value in self.reference.state_dict().items()}
        if self.optimizer is not None:
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
        metadata = {"numbers": json.dumps(self.numbers), "recipe": recipe.model_dump_json()}
        own = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
        write_file(path, save_tensors(own, metadata))

    @classmethod
    def load(
        cls,
        path: Path,
        recipe: PolicyRecipe,
        network: UnmaskingPolicy,
        new_optimizer: Callable[[int], torch.optim.AdamW],
    ) -> "RunState":
        """Read what `save` wrote, into `network`.

        Args:
            new_optimizer: makes a fresh optimizer for the stage of a number.

        Raises ValueError if the state belongs to another recipe.
        """
        check_safetensors(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if json.loads(metadata["recipe"]) != json.loads(recipe.model_dump_json()):
            raise ValueError(f"{path} belongs to another recipe; choose another --out or delete it")
        tensors = load_file(path)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        state = cls(network, None, None, json.loads(metadata["numbers"]))
        network.load_state_dict(part("network."))
        if reference := part("reference."):
            state.reference = copy.deepcopy(network)
            state.reference.load_state_dict(reference)
        if moments := part("optimizer."):
            state.optimizer = new_optimizer(state.numbers["stage"])
            found: dict[int, dict[str, Tensor]] = {}
            for name, value in moments.items():
                index, _, key = name.partition(".")
                found.setdefault(int(index), {})[key] = value
            groups = state.optimizer.state_dict()["param_groups"]
            state.optimizer.load_state_dict({"state": found, "param_groups": groups})
        return state
