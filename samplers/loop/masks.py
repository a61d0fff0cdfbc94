"""Questions to boolean tensors, each answered by the operation that is quickest on the tensor's device.

On a CPU torch's own `nonzero`, `any` and `argmax` of booleans take longer than all the rest of a step.
"""

import numpy as np
import torch
from torch import Tensor


def places(mask: Tensor) -> Tensor:
    """Flat indices of what is True, ascending, int64 [n]."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


def anywhere(mask: Tensor) -> bool:
    """Whether anything is True. Waits for the device."""
    if mask.device.type == "cpu":
        return mask.numel() > 0 and bool(mask.view(torch.uint8).max())
    return bool(mask.any())


def first_of_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Whether something is True in each row, bool [rows], and the first column where it is, int64 [rows]."""
    on_cpu = mask.device.type == "cpu"
    first = torch.from_numpy(mask.numpy().argmax(axis=1)) if on_cpu else mask.byte().argmax(dim=1)
    return mask.gather(1, first[:, None])[:, 0], first


def some_of_rows(mask: Tensor) -> Tensor:
    """Whether something is True in each row, bool [rows]."""
    return first_of_rows(mask)[0]


def runs(start: Tensor, length: Tensor) -> Tensor:
    """The integers from each start on, as many as its length says, one run after the other; all are int64 [n]."""
    if start.device.type == "cpu":
        sizes = length.numpy()
        ends = sizes.cumsum()
        return torch.from_numpy(np.repeat(start.numpy() + sizes - ends, sizes) + np.arange(ends[-1]))
    found = torch.repeat_interleave(start + length - length.cumsum(0), length)
    return found + torch.arange(len(found), device=found.device)


def counts_of(row: Tensor, rows: int) -> list[int]:
    """How often each of so many rows is named. Waits for the device."""
    if row.device.type == "cpu":
        counts: list[int] = np.bincount(row.numpy(), minlength=rows).tolist()
        return counts
    return torch.bincount(row, minlength=rows).tolist()


def rows_of(mask: Tensor) -> list[int]:
    """Rows where something is True. Waits for the device."""
    return places(some_of_rows(mask)).tolist()
