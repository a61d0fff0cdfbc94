"""How tokens are chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenChoice:
    """How a candidate's token is chosen from its distribution: greedily, or drawn at a temperature after filtering.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum.
        top_k: draw from this many likeliest tokens; 0 does not limit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = TokenChoice()


@dataclass(frozen=True)
class TokenChoices:
    """Choices of several rows of logits, or of several generations: float64 temperature and top_p, int64 top_k."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor

    @classmethod
    def of(cls, choices: list[TokenChoice], device: torch.device | None = None) -> "TokenChoices":
        """One entry a choice, [n]."""
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
        """One after the other."""
        return cls(*(torch.cat([getattr(each, name) for each in parts]) for name in ("temperature", "top_p", "top_k")))

    @property
    def filtered(self) -> Tensor:
        """Entries that do not draw from all tokens, bool."""
        return (self.top_k > 0) | (self.top_p < 1)

    @property
    def plain(self) -> Tensor:
        """Entries that leave the distribution as it is, bool: greedy, unfiltered."""
        return (self.temperature == 0) & ~self.filtered

    def to(self, device: torch.device) -> "TokenChoices":
        return TokenChoices(
            *(each.to(device, non_blocking=True) for each in (self.temperature, self.top_p, self.top_k))
        )
