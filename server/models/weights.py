"""A network's tensors: from safetensors files only, every one checked before any is used; or drawn at random."""

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from server.models.files import ModelError, read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")
DRAWN_STD = 0.02
PORTIONS = 64
"""A file is opened anew for each so small a part of all weights: what was read of an open file counts as memory, and
opening one takes milliseconds where it lists the thousands of tensors of a mixture of experts."""


class SkipInit(TorchFunctionMode):
    """Within this, modules are built without drawing their first weights.

    The meta device has nothing to draw into, yet trying loads torch's compiler, which takes as long as torch itself.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_weights(
    network: nn.Module, folder: Path, device: torch.device, dtype: torch.dtype, ignored: tuple[str, ...] = ()
) -> None:
    """Give a network that was built on the meta device its weights, in place, ready for inference.

    Tensors are copied one by one, and let go of their file again: memory holds the weights once, and a file that is
    overwritten later does not change a model that runs. Tensors whose names begin with what is `ignored` are left out.
    Raises ModelError.
    """
    source = find_weights(network, folder, ignored)
    tensors: dict[str, Tensor] = {}
    most = sum(path.stat().st_size for path in set(source.values())) // PORTIONS
    for path in dict.fromkeys(source.values()):
        names = deque(name for name in source if source[name] == path)
        while names:
            with _open(path) as file:
                tensors |= _read(file, names, most, device, dtype)
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).eval()


def find_weights(network: nn.Module, folder: Path, ignored: tuple[str, ...] = ()) -> dict[str, Path]:
    """Which file has which of a network's tensors, all of which are there and of the right shape. Raises ModelError."""
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    source: dict[str, Path] = {}
    for path in _files(folder):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name.startswith(ignored):
                    continue
                if name in source:
                    raise ModelError(f"{path}: tensor {name} is in {source[name].name} too")
                source[name] = path
                if name in wanted:
                    _check_tensor(path, name, file.get_slice(name), wanted[name])
    _check_names(folder, wanted.keys(), source.keys())
    return source


def draw_weights(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a network that was built on the meta device random weights instead, the same ones every time.

    Each is drawn in its own place: memory holds the weights once. Gains of norms are 1, biases 0, all else is normal.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, tensor in network.state_dict().items():
        drawn = torch.empty(tensor.shape, device=device, dtype=dtype)
        if tensor.dim() > 1:
            drawn.normal_(0.0, DRAWN_STD, generator=generator)
        else:
            drawn.fill_(0.0 if name.endswith("bias") else 1.0)
        tensors[name] = drawn
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).eval()


def _read(file: Any, names: deque[str], most: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies of the first tensors of these names, which are taken off, until so many bytes were read."""
    found: dict[str, Tensor] = {}
    while names and most >= 0:
        tensor = file.get_tensor(name := names.popleft())
        most -= tensor.nbytes
        found[name] = tensor.to(device=device, dtype=dtype, copy=True)
    return found


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index}: has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ModelError(f"{index}: {name!r} is not the name of a safetensors file in the same folder")
        return [folder / name for name in names]
    single = folder / SINGLE
    if single.exists():
        return [single]
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = f"; {others[0]} is not read, only safetensors are" if others else ""
    raise ModelError(f"{single}: no such file{hint}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not a whole safetensors file: {error}") from None


def _check_names(folder: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{folder}: the weights do not fit config.json: tensor {names[0]}{more} {what}")


def _check_tensor(path: Path, name: str, tensor: Any, shape: torch.Size) -> None:
    found = tuple(tensor.get_shape())
    if found != tuple(shape):
        raise ModelError(f"{path}: tensor {name} has shape {list(found)}, but config.json says {list(shape)}")
    if tensor.get_dtype() not in FLOATS:
        raise ModelError(
            f"{path}: tensor {name} is {tensor.get_dtype()}, which is not supported ({', '.join(FLOATS)} are)"
        )
