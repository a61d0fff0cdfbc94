"""A network's tensors: from safetensors files only, every one checked before any is used; or drawn at random."""

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
from server.models.files import INDEX, MOST_INDEX, ModelError, is_there, other_forms, read_json
from server.models.network import Network, matches
from server.runtime.allocator import available_memory

SINGLE = "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
DRAWN_STD = 0.02
PORTIONS = 64
"""A file is opened anew for each so small a part of all weights: what was read of an open file counts as memory, and
opening one takes milliseconds where it lists the thousands of tensors of a mixture of experts."""
COMPARED = 2**22
"""Numbers of two tensors that are compared at once."""


class SkipInit(TorchFunctionMode):
    """Within this, modules are built without drawing their first weights.

    The meta device has nothing to draw into, yet trying loads torch's compiler, which takes as long as torch itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class Source(NamedTuple):
    """Place of a tensor: a file, the name it has there, and the index in a stack of tensors."""

    path: Path
    name: str
    place: int | None = None


def load_weights(network: Network, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Give a network that was built on the meta device its weights, in place, ready for inference.

    Tensors are copied one by one, and let go of their file again: memory holds the weights once, and a file that is
    overwritten later does not change a model that runs. Raises ModelError.
    """
    sources = find_weights(network, folder)
    _check_memory(network, device, dtype)
    tensors: dict[str, Tensor] = {}
    paths = dict.fromkeys(source.path for source in sources.values())
    most = sum(path.stat().st_size for path in paths) // PORTIONS
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
    """Locate each of a network's tensors, all of which are there and of the right shape. Raises ModelError.

    Files may repeat tensors under the names they have in a network that does not share them, if they are the same.
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
    """Fill in what has a stand-in, if all of it is left out."""
    others = {name: other for name in wanted if (other := network.stand_in(name)) is not None}
    if not others.keys() & sources.keys():
        sources |= {name: sources[other] for name, other in others.items() if other in sources}


def draw_weights(network: Network, device: torch.device, dtype: torch.dtype) -> None:
    """Give a network that was built on the meta device random weights instead, the same ones every time.

    Each is drawn in its own place: memory holds the weights once. Gains of norms are 1, biases 0, all else is normal.
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
    """Refuse weights that cannot fit before the system, which promises more than it has, ends the process for them.

    Raises MemoryError.
    """
    need = sum(tensor.numel() * network.dtype_of(name, dtype).itemsize for name, tensor in network.state_dict().items())
    with suppress(OSError):  # systems that do not say
        if need > available_memory(device):
            raise MemoryError


def _files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; the single one counts more than an index, as in transformers."""
    single, index = folder / SINGLE, folder / INDEX
    if is_there(single):
        return [single]
    if is_there(index):
        shards = read_json(index, MOST_INDEX).get("weight_map")
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
    """Hold two tensors of one shape against each other, part by part. Raises ModelError if they differ."""
    rows, done = 1, 0
    while done < rows:
        with _open(source.path) as one, _open(copy.path) as other:
            slices = one.get_slice(source.name), other.get_slice(copy.name)
            shape = slices[0].get_shape()
            rows = shape[0] if shape else 1
            step = max(1, COMPARED // max(1, math.prod(shape[1:])))
            parts = [part[done : done + step] if shape else part[...] for part in slices]
            kind = torch.promote_types(parts[0].dtype, parts[1].dtype)
            if not torch.equal(parts[0].to(kind), parts[1].to(kind)):
                raise ModelError(
                    f"{folder}: tensor {copy.name} differs from {source.name}, whose copy config.json says it is"
                )
            done += step
