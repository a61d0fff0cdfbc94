"""Random numbers that depend only on a generation's seed, the step and the position.

A counter-based stream (SplitMix64, Steele et al., OOPSLA 2014): it keeps no state, is the same on every device, and
does not depend on the other rows of the batch.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_U_GOLDEN, _U_MIX_1, _U_MIX_2 = (np.uint64(each % 2**64) for each in (_GOLDEN, _MIX_1, _MIX_2))
_BITS = {bits: np.uint64(bits) for bits in (11, 27, 30, 31)}
TOKENS, POSITIONS, FIRST, LATER, NOISE, BARRIER, SLOTS = 1, 2, 3, 4, 5, 6, 7
"""Random streams: token choice; position choice; the first draw of a position order and the later ones; initial content
of blocks without a mask token; resampling at barriers; seeds of further canvases."""


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def uniform(seed: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    """Uniform random numbers in [0, 1), float64, for broadcastable int64 seeds, steps and positions."""
    # The seed is mixed before the stream is added; otherwise one seed's second stream would be the next seed's first.
    if position.device.type == "cpu" and position.dim():
        return torch.from_numpy(_numpy_uniform(seed.numpy(), step.numpy(), position.numpy(), stream))
    x = _mix(_mix(_mix(_mix(seed) + stream) ^ step) ^ position)
    return _shift(x, 11).double() * 2.0**-53


def _numpy_uniform(seed: Any, step: Any, position: Any, stream: int) -> Any:
    """`uniform` on the CPU at a tenth of the cost: numpy shifts logically and works in place."""
    with np.errstate(over="ignore"):
        x = _numpy_mix(_numpy_mix(seed.view(np.uint64).copy()) + np.uint64(stream))
        x = _numpy_mix(_numpy_mix(x ^ step.view(np.uint64)) ^ position.view(np.uint64))
    return (x >> _BITS[11]) * 2.0**-53


def _numpy_mix(x: Any) -> Any:
    x = x + _U_GOLDEN
    x ^= x >> _BITS[30]
    x *= _U_MIX_1
    x ^= x >> _BITS[27]
    x *= _U_MIX_2
    x ^= x >> _BITS[31]
    return x


def slot_seed(seed: int, slot: int) -> int:
    """Seed of one of a generation's canvases; the first uses the generation's own."""
    if slot == 0:
        return seed
    mixed = _mix(_mix(torch.tensor(seed, dtype=torch.int64)) + SLOTS + slot)
    return int(mixed)
