"""What one forward pass says about each candidate position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor


class Statistic(StrEnum):
    """A number per candidate that a sampler can ask for. Token and confidence are always computed.

    Entropy is in nats; margin is the difference of the two largest probabilities. Those of `chosen_` are of the
    distribution that the token is chosen from, after temperature, top-k and top-p, as is `chosen_confidence`. The
    likeliest token is a number too, for those who draw tokens and still want to know.
    """

    ENTROPY = "entropy"
    MARGIN = "margin"
    CHOSEN_CONFIDENCE = "chosen_confidence"
    CHOSEN_ENTROPY = "chosen_entropy"
    CHOSEN_MARGIN = "chosen_margin"
    LIKELIEST = "likeliest"


CHOSEN = frozenset({Statistic.CHOSEN_CONFIDENCE, Statistic.CHOSEN_ENTROPY, Statistic.CHOSEN_MARGIN})


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


@dataclass(frozen=True)
class Bonus:
    """Sparse additions to logits: int64 [b] rows of logits, int64 [b] tokens, float32 [b] values."""

    index: Tensor
    token: Tensor
    value: Tensor

    def part(self, start: int, stop: int) -> "Bonus":
        """Of rows of logits from `start` to `stop`, counted from there."""
        mine = (self.index >= start) & (self.index < stop)
        return Bonus(self.index[mine] - start, self.token[mine], self.value[mine])

    def to(self, device: torch.device) -> "Bonus":
        return Bonus(*(each.to(device, non_blocking=True) for each in (self.index, self.token, self.value)))


@dataclass(frozen=True)
class Wanted:
    """What to say of each of n rows of logits beside token and confidence, and how to choose the token.

    Attributes:
        statistics: further numbers.
        only: bool [n] for a statistic (or "top") that not all rows want; what it is for the others is undefined.
        choices: one per row; None chooses greedily everywhere.
        uniform: float [n] in [0, 1), a number for each row, needed where a choice has a temperature.
        top: how many of the largest probabilities to give; a vocabulary of fewer tokens is filled up with zeros.
        named: int64 [n, m], tokens whose probabilities are wanted; those of -1 are 0.
        bonus: what to add to the logits before anything else.
    """

    statistics: frozenset[Statistic] = frozenset()
    only: Mapping[str, Tensor] = field(default_factory=dict)
    choices: Sequence[TokenChoice] | None = None
    uniform: Tensor | None = None
    top: int = 0
    named: Tensor | None = None
    bonus: Bonus | None = None

    def part(self, start: int, stop: int) -> "Wanted":
        """Of rows `start` to `stop`."""
        return replace(
            self,
            only={name: rows[start:stop] for name, rows in self.only.items()},
            choices=self.choices and self.choices[start:stop],
            uniform=None if self.uniform is None else self.uniform[start:stop],
            named=None if self.named is None else self.named[start:stop],
            bonus=self.bonus and self.bonus.part(start, stop),
        )

    def to(self, device: torch.device) -> "Wanted":
        """With its tensors there, but for those that are looked into, which would mean to wait for the device."""
        return replace(
            self,
            uniform=None if self.uniform is None else self.uniform.to(device, non_blocking=True),
            named=None if self.named is None else self.named.to(device, non_blocking=True),
        )


NOTHING = Wanted()


@dataclass(frozen=True)
class Prediction:
    """Statistics of one forward pass at all positions that were asked for, flattened over the batch's rows.

    Attributes:
        token: int64 [n], what would be committed; never the mask token.
        confidence: float32 [n], probability of that token under the model's unmodified distribution.
        extra: further statistics that were asked for, float32 [n] each.
        top: the largest probabilities, descending, float32 [n, as many as were asked for]; None where none were.
        named: probabilities of the tokens that were named, float32 [n, as many]; None where none were.
    """

    token: Tensor
    confidence: Tensor
    extra: dict[Statistic, Tensor]
    top: Tensor | None = None
    named: Tensor | None = None

    @classmethod
    def join(cls, parts: "Sequence[Prediction]") -> "Prediction":
        """All rows of several."""
        top = [part.top for part in parts if part.top is not None]
        named = [part.named for part in parts if part.named is not None]
        return cls(
            torch.cat([part.token for part in parts]),
            torch.cat([part.confidence for part in parts]),
            {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra},
            torch.cat(top) if top else None,
            torch.cat(named) if named else None,
        )

    def cpu(self) -> "Prediction":
        """On the CPU, in one copy: token ids fit float32 exactly up to a vocabulary of 2 ** 24."""
        if self.token.device.type == "cpu":
            return self
        columns = [self.token.float()[:, None], self.confidence[:, None]]
        columns += [values[:, None] for values in self.extra.values()]
        columns += [values for values in (self.top, self.named) if values is not None]
        widths = [column.shape[1] for column in columns]
        token, confidence, *rest = torch.split(torch.cat(columns, dim=1).cpu(), widths, dim=1)
        extra = {name: rest.pop(0)[:, 0] for name in self.extra}
        top = rest.pop(0) if self.top is not None else None
        return Prediction(token[:, 0].long(), confidence[:, 0], extra, top, rest.pop(0) if rest else None)
