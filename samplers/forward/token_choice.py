"""Token choice: greedy, or sampled at a temperature."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenChoice:
    """Choice of a candidate's token from its distribution: greedy, or drawn at a temperature after filtering.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum.
        top_k: draw from this number of likeliest tokens; 0 does not limit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = TokenChoice()


@dataclass(frozen=True)
class TokenChoices:
    """Token choices of several rows or generations: float64 temperature and top_p, int64 top_k, [n] each."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, choices: list[TokenChoice], device: torch.device | None = None) -> "TokenChoices":
        """Stack choices into tensors [n]."""
        return cls(
            torch.tensor([each.temperature for each in choices], dtype=torch.float64, device=device),
            torch.tensor([each.top_p for each in choices], dtype=torch.float64, device=device),
            torch.tensor([each.top_k for each in choices], dtype=torch.int64, device=device),
        )

    def __len__(self) -> int:
        return len(self.temperature)

    def __getitem__(self, index: Tensor | slice) -> "TokenChoices":
        return TokenChoices(self.temperature[index], self.top_p[index], self.top_k[index])

    @classmethod
    def cat(cls, parts: list["TokenChoices"]) -> "TokenChoices":
        """Concatenate several."""
        return cls(*(torch.cat([getattr(each, name) for each in parts]) for name in ("temperature", "top_p", "top_k")))

    @property
    def filtered(self) -> Tensor:
        """Mask of entries with a top-k or top-p filter, bool."""
        return (self.top_k > 0) | (self.top_p < 1)

    @property
    def plain(self) -> Tensor:
        """Mask of entries that leave the distribution unmodified, bool: greedy and unfiltered."""
        return (self.temperature == 0) & ~self.filtered

    def to(self, device: torch.device) -> "TokenChoices":
        return TokenChoices(
            *(each.to(device, non_blocking=True) for each in (self.temperature, self.top_p, self.top_k))
        )
