"""A policy as a folder: `policy.safetensors` and `policy.json`. Nothing is ever unpickled."""

import json
import os
import re
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from policies.evaluation.measure import Measurement
from policies.files.atomic import flush, held, write_files
from policies.files.regular import MOST_LISTED, MOST_WORD, check_header, open_regular, read_file, read_open
from policies.network.config import PolicyConfig
from policies.network.policy_network import UnmaskingPolicy

WEIGHTS, CARD = "policy.safetensors", "policy.json"
NEXT = ".policy.next"
"""Card and weights in one file while a policy is saved; once it is there, it counts and not the other two."""
NEXT_CARD = "card"
"""Key of the card in that file's metadata."""
MOST_CARD_BYTES, MOST_WEIGHT_BYTES = 1 << 20, 64 << 20
MOST_HEADER_BYTES = 4 << 20
MOST_SAID = 128 << 10
"""Most bytes of JSON of the parts of a card that appear in answers: training and measurements."""
LOOKS = 100
"""Most attempts of a reader that is disturbed by writers."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class PolicyError(ValueError):
    """A folder without a policy that can be served; the message is one line with the reason."""


Text = Annotated[str, Field(max_length=256)]
Word = Annotated[str, Field(max_length=MOST_WORD)]
Length = Annotated[int, Field(gt=0, le=2**31 - 1)]
"""Bounded like all that a card says, because it appears in many answers."""


class Origin(BaseModel):
    """The frozen model that a policy learns from."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    model: Text
    model_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    architecture: Text
    vocab_size: Length


class TrainedOn(Origin):
    """Training of a policy. A block length of None is full diffusion; `alphas` are the reward's."""

    task: tuple[Word, ...] = Field(max_length=MOST_LISTED)
    gen_lengths: tuple[Length, ...] = Field(min_length=1, max_length=MOST_LISTED)
    block_lengths: tuple[Length | None, ...] = Field((None,), min_length=1, max_length=MOST_LISTED)
    alphas: tuple[float, ...] = Field((), max_length=MOST_LISTED)
    seed: int = Field(0, ge=-(2**63), lt=2**63)
    updates: int = Field(0, ge=0, lt=2**63)
    seconds: float = Field(0.0, ge=0)


class PolicyCard(BaseModel):
    """Description of a policy: everything but its weights."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    format: Literal[1] = 1
    config: PolicyConfig
    trained_on: TrainedOn
    recipe: dict[str, Any] = Field(default_factory=dict, description="the training recipe, as it was read")
    measured: list[Measurement] = Field(default_factory=list, max_length=1000, description="held-out results")
    licence: Text = "Apache-2.0"

    @model_validator(mode="after")
    def _is_short(self) -> "PolicyCard":
        if len(self.model_dump_json(include={"trained_on", "measured"}).encode()) > MOST_SAID:
            said = f"trained_on and measured have more than {MOST_SAID} bytes as JSON"
            raise PydanticCustomError("too_long", "{said}", {"said": said})
        return self


def save_policy(network: UnmaskingPolicy, card: PolicyCard, folder: Path) -> None:
    """Write a policy. Readers find the old one or the new one, also after a kill at any point.

    Two files cannot be replaced in one step. So the new policy is first written to a single file, which takes
    precedence over the other two as long as it exists. Other writers of the folder wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in network.state_dict().items()}
    text = card.model_dump_json(indent=1) + "\n"
    with held(folder, alone=True):
        write_files(folder, {NEXT: save_tensors(tensors, {"format": "pt", NEXT_CARD: text})})
        write_files(folder, {WEIGHTS: save_tensors(tensors, {"format": "pt"}), CARD: text})
        (folder / NEXT).unlink()
        flush(folder)


def load_policy(folder: Path, device: str = "cpu", within: Path | None = None) -> tuple[UnmaskingPolicy, PolicyCard]:
    """Read a policy. Raises PolicyError if a part is missing, malformed, too large, of wrong shape or not finite.

    Args:
        within: refuse files that are outside this folder once links are followed.
    """
    if within is not None:
        _check_within(folder, within)
    content, weights = _read_both(folder)
    card = _card(folder / CARD, content)
    try:
        check_header(weights[:8], len(weights), MOST_HEADER_BYTES)
        tensors = load_tensors(weights)
    except (SafetensorError, ValueError, KeyError) as error:
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


def _is_there(path: Path) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError):
        path.stat()
        return True
    return False


def _check_within(folder: Path, base: Path) -> None:
    """Raise PolicyError if a folder, or a file of it, is outside `base` once links are followed."""
    for path in (folder, *(folder / name for name in (CARD, WEIGHTS, NEXT))):
        try:
            inside = base.resolve() in path.resolve().parents
        except (OSError, RuntimeError, ValueError):  # links in a circle; a name with a null character
            inside = False
        if not inside:
            raise PolicyError(f"{path}: is not inside {base}, where policies are to be")


def _card(path: Path, content: bytes) -> PolicyCard:
    try:
        return PolicyCard.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise PolicyError(f"{path}: {where + ': ' if where else ''}{first['msg'][:300]}") from None


def _read_both(folder: Path) -> tuple[bytes, bytes]:
    """Read a policy's card and weights as they were saved together. Raises PolicyError."""
    path = folder
    try:
        for _ in range(LOOKS):
            path = folder / NEXT
            with suppress(FileNotFoundError):
                weights = read_file(path, MOST_CARD_BYTES + MOST_WEIGHT_BYTES)
                return _card_of(weights, path), weights
            path = folder / CARD
            with open_regular(path) as card, open_regular(folder / WEIGHTS) as file:
                # A writer that came in between has left other files in the place of these, or is not done yet.
                if not _is_there(folder / NEXT) and _is_at(folder / CARD, card) and _is_at(folder / WEIGHTS, file):
                    content = read_open(card, folder / CARD, MOST_CARD_BYTES)
                    return content, read_open(file, folder / WEIGHTS, MOST_WEIGHT_BYTES)
    except OSError as error:
        raise PolicyError(f"{error.filename or path}: {error.strerror}") from error
    raise PolicyError(f"{folder}: is written to all the time")


def _is_at(path: Path, file: BufferedReader) -> bool:
    return os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _card_of(weights: bytes, path: Path) -> bytes:
    """Read the card from the metadata of the file that holds both. Raises PolicyError."""
    try:
        check_header(weights[:8], len(weights), MOST_HEADER_BYTES)
        header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
        return str(header["__metadata__"][NEXT_CARD]).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PolicyError(f"{path}: not a policy: {str(error)[:200]}") from None
