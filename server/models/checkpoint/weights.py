"""Weights of a network: from safetensors files, all checked before any is used, or random."""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from policies.files.regular import check_safetensors
from server.models.checkpoint.variants import looks_quantised
from server.models.files import INDEX, MAX_INDEX, ModelError, is_there, other_forms, read_json
from server.models.network import Network, matches
from server.runtime.allocator import available_memory

SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
DRAWN_STD = 0.02
REOPENINGS = 64
"""Number of times files are reopened while all weights are read: pages read through an open file count as used memory.
Opening a file takes milliseconds if it lists the thousands of tensors of a mixture of experts."""
COMPARED_AT_ONCE = 2**22
"""Elements of two tensors compared at a time."""


class SkipInit(TorchFunctionMode):
    """Mode in which modules are built without drawing initial weights.

    Drawing does nothing on the meta device, yet loads torch's compiler, which takes as long as importing torch.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Source(NamedTuple):
    """Location of a tensor: file, name in it, and index in a stacked tensor, if any."""

    path: Path
    name: str
    place: int | None = None


def load_weights(network: Network, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Load the weights of a network built on the meta device, in place, ready for inference.

    Tensors are copied out of the file one by one: memory holds the weights once, and overwriting a file later does not
    change a running model. Raises ModelError.
    """
    sources = find_weights(network, folder)
    _check_memory(network, device, dtype)
    tensors: dict[str, Tensor] = {}
    paths = dict.fromkeys(source.path for source in sources.values())
    most = sum(path.stat().st_size for path in paths) // REOPENINGS
    for path in paths:
        names = deque(name for name, source in sources.items() if source.path == path)
        while names:
            with _open(path) as file:
                read = most
                while names and read >= 0:
                    name = names.popleft()
                    _, stored, place = sources[name]
                    tensor = file.get_tensor(stored) if place is None else file.get_slice(stored)[place]
                    read -= tensor.nbytes
                    tensors[name] = tensor.to(device=device, dtype=network.dtype_of(name, dtype), copy=True)
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).eval()


def find_weights(network: Network, folder: Path) -> dict[str, Source]:
    """Locate all tensors of a network and check their shapes. Raises ModelError.

    Files may also store shared tensors under their unshared names, if the copies are equal.
    """
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    sources: dict[str, Source] = {}
    copies: list[tuple[str, Source]] = []
    seen: dict[str, Path] = {}
    for path in _files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if matches(name, network.ignored):
                    continue
                if name in seen:
                    raise ModelError(f"{path}: tensor {name} is in {seen[name].name} too")
                seen[name] = path
                tensor, stack = file.get_slice(name), network.stacked(network.config, name)
                if stack and wanted.keys() >= set(stack):
                    _check_tensor(path, name, tensor, torch.Size((len(stack), *wanted[stack[0]])))
                    for place, part in enumerate(stack):
                        if part in sources:
                            raise ModelError(f"{path}: tensor {name} repeats {sources[part].name}")
                        sources[part] = Source(path, name, place)
                    continue
                own, found = network.own_name(network.config, name), Source(path, name)
                if own in wanted:
                    _check_tensor(path, name, tensor, wanted[own])
                if (first := sources.get(own)) is None:
                    sources[own] = found
                    continue
                if first.place is not None:
                    raise ModelError(f"{path}: tensor {name} repeats {first.name}")
                if name == own:
                    sources[own], found = found, first
                copies.append((own, found))
    _add_stand_ins(network, wanted, sources)
    _check_names(folder, wanted, sources)
    for own, copy in copies:
        _check_copy(folder, sources[own], copy)
    return sources


def _add_stand_ins(network: Network, wanted: Iterable[str], sources: dict[str, Source]) -> None:
    """Use the stand-ins of a kind of tensor if files lack all tensors of it."""
    others = {name: other for name in wanted if (other := network.stand_in(name)) is not None}
    if not others.keys() & sources.keys():
        sources |= {name: sources[other] for name, other in others.items() if other in sources}


def draw_weights(network: Network, device: torch.device, dtype: torch.dtype) -> None:
    """Draw random weights, the same every time, for a network built on the meta device.

    Tensors are drawn in place: memory holds the weights once. Norm weights are 1, biases 0, all else is normal.
    """
    _check_memory(network, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, tensor in network.state_dict().items():
        drawn = torch.empty(tensor.shape, device=device, dtype=network.dtype_of(name, dtype))
        if tensor.dim() > 1:
            drawn.normal_(0.0, DRAWN_STD, generator=generator)
        else:
            drawn.fill_(0.0 if name.endswith("bias") else 1.0)
        tensors[name] = drawn
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).eval()


def _check_memory(network: Network, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse weights that cannot fit: the system overcommits memory, and would kill the process for using it.

    Raises MemoryError.
    """
    need = sum(tensor.numel() * network.dtype_of(name, dtype).itemsize for name, tensor in network.state_dict().items())
    with suppress(OSError):  # systems that do not report it
        if need > available_memory(device):
            raise MemoryError


def _files(folder: Path) -> list[Path]:
    """Safetensors files of a folder; a single file takes precedence over an index, as in transformers."""
    single, index = folder / SINGLE, folder / INDEX
    if is_there(single):
        return [single]
    if is_there(index):
        shards = read_json(index, MAX_INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index}: has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index}: {name!r} is not the name of a safetensors file in the same folder")
        return [folder / name for name in names]
    raise ModelError(f"{single}: no such file{other_forms(folder)}")


def _open(path: Path) -> Any:
    try:
        check_safetensors(path)
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def _check_names(folder: Path, wanted: Iterable[str], sources: Mapping[str, Source]) -> None:
    unexpected = sorted(sources[name].name for name in sources.keys() - set(wanted))
    if quantised := [name for name in unexpected if looks_quantised(name)]:
        raise ModelError(f"{folder}: the weights are quantised (tensor {quantised[0]}), which is not supported")
    for what, names in (("missing", sorted(set(wanted) - sources.keys())), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{folder}: the weights do not fit config.json: tensor {names[0]}{more} {what}")


def _check_tensor(path: Path, name: str, tensor: Any, shape: torch.Size) -> None:
    found, kind = tuple(tensor.get_shape()), tensor.get_dtype()
    if kind not in FLOATS:
        quantised = ": the weights are quantised" if kind not in ("BOOL", "C64", "I64") else ""
        raise ModelError(
            f"{path}: tensor {name} is {kind}, which is not supported ({', '.join(FLOATS)} are){quantised}"
        )
    if found != tuple(shape):
        raise ModelError(f"{path}: tensor {name} has shape {list(found)}, but config.json says {list(shape)}")


def _check_copy(folder: Path, source: Source, copy: Source) -> None:
    """Compare two tensors of equal shape, part by part. Raises ModelError if they differ."""
    rows, done = 1, 0
    while done < rows:
        with _open(source.path) as one, _open(copy.path) as other:
            slices = one.get_slice(source.name), other.get_slice(copy.name)
            shape = slices[0].get_shape()
            rows = shape[0] if shape else 1
            step = max(1, COMPARED_AT_ONCE // max(1, math.prod(shape[1:])))
            parts = [part[done : done + step] if shape else part[...] for part in slices]
            kind = torch.promote_types(parts[0].dtype, parts[1].dtype)
            if not torch.equal(parts[0].to(kind), parts[1].to(kind)):
                raise ModelError(
                    f"{folder}: tensor {copy.name} differs from {source.name}, whose copy config.json says it is"
                )
            done += step
