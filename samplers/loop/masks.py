"""Queries on boolean tensors, each by the operation that is fastest on the tensor's device.

On a CPU, torch's own `nonzero`, `any` and `argmax` of booleans take longer than all the rest of a step.
"""

import numpy as np
import torch
from torch import Tensor


def places(mask: Tensor) -> Tensor:
    """Flat indices of True entries, ascending, int64 [n]."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero()[:, 0]


def anywhere(mask: Tensor) -> bool:
    """True if any entry is True. Waits for the device."""
    if mask.device.type == "cpu":
        return mask.numel() > 0 and bool(mask.view(torch.uint8).max())
    return bool(mask.any())


def first_of_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mask of rows with a True entry, bool [rows], and the column of the first one, int64 [rows]."""
    if mask.device.type == "cpu":
        values = mask.numpy()
        return torch.from_numpy(values.any(axis=1)), torch.from_numpy(values.argmax(axis=1))
    first = mask.byte().argmax(dim=1)
    return mask.gather(1, first[:, None])[:, 0], first


def some_of_rows(mask: Tensor) -> Tensor:
    """Mask of rows with a True entry, bool [rows]."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().any(axis=1))
    return mask.any(dim=1)


def runs(start: Tensor, length: Tensor) -> Tensor:
    """Concatenated runs of consecutive integers, each from its start and of its length; all are int64 [n]."""
    if start.device.type == "cpu":
        sizes = length.numpy()
        ends = sizes.cumsum()
        return torch.from_numpy(np.repeat(start.numpy() + sizes - ends, sizes) + np.arange(ends[-1]))
    found = torch.repeat_interleave(start + length - length.cumsum(0), length)
    return found + torch.arange(len(found), device=found.device)


def counts_of(row: Tensor, rows: int) -> list[int]:
    """Number of occurrences of each row index below `rows`. Waits for the device."""
    if row.device.type == "cpu":
        counts: list[int] = np.bincount(row.numpy(), minlength=rows).tolist()
        return counts
    return torch.bincount(row, minlength=rows).tolist()


def rows_of(mask: Tensor) -> list[int]:
    """Indices of rows with a True entry. Waits for the device."""
    return places(some_of_rows(mask)).tolist()
