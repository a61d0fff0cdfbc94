"""Records of rollouts: observations and actions of every step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from policies.network.observation import Observation

FILL: dict[str, float] = {"seen.tokens": -1, "confidence": -torch.inf, "order": -1}
"""Values of padding, where these are not 0 or False."""


@dataclass(frozen=True)
class Transitions:
    """Steps of many generations, one line per generation and step; padded to the longest region.

    Attributes:
        row: int64 [n], index of the generation.
        seen: observations, [n, width, ...].
        candidates, action, committed: bool [n, width].
        confidence: float32 [n, width], -inf where unknown.
        order: int64 [n, width], -1 where nothing was drawn; None for unordered draws.
        right: bool [n, width], commits of the oracle; None if it was not asked.
    """

    row: Tensor
    seen: Observation
    candidates: Tensor
    action: Tensor
    committed: Tensor
    confidence: Tensor
    order: Tensor | None = None
    right: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, those of the observation as `seen.NAME`."""
        own = {name: getattr(self, name) for name in _NAMES if name != "seen"}
        seen = {f"seen.{name}": getattr(self.seen, name) for name in _SEEN}
        return {name: value for name, value in (own | seen).items() if value is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Transitions":
        """Inverse of `tensors`; other names are ignored."""
        seen = {name: tensors[f"seen.{name}"] for name in _SEEN if f"seen.{name}" in tensors}
        own = {name: tensors[name] for name in _NAMES if name in tensors}
        return cls(seen=Observation(**seen), **own)

    @classmethod
    def join(cls, parts: "Sequence[Transitions]") -> "Transitions":
        """Lines one after the other, padded to the longest region. Optional tensors stay where all parts have them."""
        found = [part.tensors() for part in parts]
        names = [name for name in found[0] if all(name in each for each in found)]
        return cls.of({name: _joined([each[name] for each in found], FILL.get(name, 0)) for name in names})

    def __getitem__(self, lines: Tensor | slice) -> "Transitions":
        """Select lines."""
        return self.of({name: value[lines] for name, value in self.tensors().items()})


_NAMES = tuple(each.name for each in fields(Transitions))
_SEEN = tuple(each.name for each in fields(Observation))


def _joined(parts: list[Tensor], fill: float) -> Tensor:
    """Concatenate tensors [n], or [n, width, ...] padded to one width."""
    if parts[0].dim() > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(x, (0, 0) * (x.dim() - 2) + (0, longest - x.shape[1]), value=fill) for x in parts]
    return torch.cat(parts)
