"""A policy as a folder: `policy.safetensors` and `policy.json`. Nothing is ever unpickled."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from policies.evaluate import Row
from policies.network import PolicyConfig, UnmaskingPolicy

WEIGHTS, CARD = "policy.safetensors", "policy.json"
MOST_CARD_BYTES, MOST_WEIGHT_BYTES = 1 << 20, 64 << 20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class PolicyError(ValueError):
    """A folder that is no policy we can serve: one line that says why."""


class Origin(BaseModel):
    """The frozen model that a policy learns from."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    model_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    architecture: str
    vocab_size: int = Field(gt=0)


class TrainedOn(Origin):
    """What a policy learned from. A block length of None is full diffusion; `alphas` are the reward's."""

    task: tuple[str, ...]
    gen_lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)
    block_lengths: tuple[Annotated[int, Field(gt=0)] | None, ...] = Field((None,), min_length=1)
    alphas: tuple[float, ...] = ()
    seed: int = 0
    updates: int = Field(0, ge=0)
    seconds: float = Field(0.0, ge=0)


class PolicyCard(BaseModel):
    """All there is to know of a policy beside its weights."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    config: PolicyConfig
    trained_on: TrainedOn
    recipe: dict[str, Any] = Field(default_factory=dict, description="the training recipe, as it was read")
    measured: list[Row] = Field(default_factory=list, description="held-out results")
    licence: str = "Apache-2.0"


def save_policy(network: UnmaskingPolicy, card: PolicyCard, folder: Path) -> None:
    """Write a policy; each file whole or not at all, the card last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in network.state_dict().items()}
    _write(folder / WEIGHTS, save_tensors(tensors, {"format": "pt"}))
    _write(folder / CARD, (card.model_dump_json(indent=1) + "\n").encode())


def load_policy(folder: Path, device: str = "cpu") -> tuple[UnmaskingPolicy, PolicyCard]:
    """Read a policy. Raises PolicyError for what is missing, malformed, too large, of wrong shape or not finite."""
    card = _card(folder / CARD)
    try:
        tensors = load_tensors(_read(folder / WEIGHTS, MOST_WEIGHT_BYTES))
    except (SafetensorError, ValueError, KeyError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(f"{folder / WEIGHTS}: not a safetensors file: {str(error)[:200]}") from None
    with torch.device("meta"):
        network = UnmaskingPolicy(card.config)
    wanted = network.state_dict()
    for what, names in (("lacks", wanted.keys() - tensors.keys()), ("has unknown", tensors.keys() - wanted.keys())):
        if names:
            raise PolicyError(f"{folder / WEIGHTS}: {what} tensor {sorted(names)[0][:200]!r}")
    for name, value in tensors.items():
        if value.shape != wanted[name].shape:
            shapes = f"{list(value.shape)}, but the configuration says {list(wanted[name].shape)}"
            raise PolicyError(f"{folder / WEIGHTS}: {name} has shape {shapes}")
        if value.dtype != torch.float32:
            raise PolicyError(f"{folder / WEIGHTS}: {name} is {value.dtype}, not float32")
        if not bool(value.isfinite().all()):
            raise PolicyError(f"{folder / WEIGHTS}: {name} holds a value that is not finite")
    network.load_state_dict(tensors, assign=True)
    return network.to(device).requires_grad_(False).eval(), card


def _card(path: Path) -> PolicyCard:
    content = _read(path, MOST_CARD_BYTES)
    try:
        return PolicyCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PolicyError(f"{path}: {where + ': ' if where else ''}{first['msg'][:300]}") from None


def _read(path: Path, most: int) -> bytes:
    """A regular file's bytes, no more than `most`."""
    try:
        # Not blocking: a pipe in the place of a file must not hang whoever loads it.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror}") from None
    if len(content) > most:
        raise PolicyError(f"{path}: more than {most} bytes, which no policy has")
    return content


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
