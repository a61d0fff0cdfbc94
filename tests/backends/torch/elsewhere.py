"""A device that is none: tensors that say they are elsewhere, refuse to meet the processor's, and are computed on it.

As on a GPU, what is elsewhere is asked for by "meta" and says that it is on "meta:0"; numbers alone may be of the
processor, and so may indices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

ASKED, PLACE = "meta", torch.device("meta:0")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
NUMBERS = {torch.where, Tensor.where, F.scaled_dot_product_attention}
"""Make tensors of numbers on the device by themselves, which would have no content."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class DeviceError(RuntimeError):
    """Tensors of two devices in one operation."""


class Elsewhere(Tensor):
    """A tensor of that device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Elsewhere":
        with torch.inference_mode(False):  # wrappers of tensors of both kinds meet in one operation
            found: Elsewhere = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=PLACE
            )
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        here = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and type(each) is not cls]
        meets = [each for each in here if each.dim()]
        if func in INDEXING:
            meets = [each for each in args[2:3] if type(each) is not cls and each.dim()]
        if meets and func not in COPIES:
            raise DeviceError(f"{func} of tensors on {PLACE} and on the processor")
        to = kwargs.pop("device", None)
        inner = tree_map(lambda each: each.inner if type(each) is cls else each, (args, kwargs))
        found = func(*inner[0], **inner[1])
        if to is not None and torch.device(to).type == "cpu":
            return found
        if args and type(args[0]) is not cls and func is aten.copy_.default:
            return args[0]  # back on the processor
        if args and found is tree_leaves(inner)[0] and type(args[0]) is cls:
            return args[0]
        return tree_map(lambda each: cls(each) if isinstance(each, Tensor) else each, found)


class Device(TorchFunctionMode):
    """Makes tensors of that device where they are asked for, as long as it lasts."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and type(args[0]) is Elsewhere:
            return args[0].inner.tolist()
        if func is Tensor.__setitem__ and type(args[0]) is Elsewhere:
            return _set(*args)
        if func in NUMBERS:
            return _unwrapped(func, args, kwargs)
        if func is Tensor.new_tensor and type(args[0]) is Elsewhere:
            return Elsewhere(torch.tensor(*args[1:], **kwargs))
        if func is Tensor.to and type(args[0]) is not Elsewhere and _is_there(args[1:], kwargs):
            return moved(args[0].to(*[each for each in args[1:] if isinstance(each, torch.dtype)]))
        if type(kwargs.get("device")) in (str, torch.device) and _is_there((), kwargs):
            first = args[0] if args else None
            if type(first) is not Elsewhere:
                return Elsewhere(func(*args, **(kwargs | {"device": "cpu"})))
        return func(*args, **kwargs)


def _set(tensor: Elsewhere, index: Any, value: Any) -> None:
    """As a device does it: what is copied may come from the processor, what is scattered may not."""
    scattered = any(isinstance(each, Tensor) for each in (index if isinstance(index, tuple) else (index,)))
    if scattered and isinstance(value, Tensor) and type(value) is not Elsewhere and value.dim():
        raise DeviceError(f"values of the processor put at places on {PLACE}")
    index, value = tree_map(lambda each: each.inner if type(each) is Elsewhere else each, (index, value))
    tensor.inner[index] = value


def _unwrapped(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    here = [type(each) is Elsewhere for each in (*args, *kwargs.values()) if isinstance(each, Tensor) and each.dim()]
    if not any(here):
        return func(*args, **kwargs)
    if not all(here):
        raise DeviceError(f"{func} of tensors on {PLACE} and on the processor")
    args, kwargs = tree_map(lambda each: each.inner if type(each) is Elsewhere else each, (args, kwargs))
    return Elsewhere(func(*args, **kwargs))


def _is_there(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    asked = [each for each in (*args[:1], kwargs.get("device")) if isinstance(each, str | torch.device)]
    return any(torch.device(each).type == ASKED for each in asked)


def moved(tensor: Tensor) -> Tensor:
    """A copy of it, elsewhere."""
    return Elsewhere(tensor.detach().clone())


def move(network: nn.Module) -> None:
    """Take a network's weights there."""
    for module in network.modules():
        for name, each in module._parameters.items():
            if each is not None:
                module._parameters[name] = nn.Parameter(moved(each), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
