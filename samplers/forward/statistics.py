"""Statistics that can be requested of a forward at each position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import torch
from torch import Tensor

from samplers.forward.token_choice import GREEDY, TokenChoices


class Statistic(StrEnum):
    """A number per candidate that a sampler can request. Token and confidence are always computed.

    Entropy is in nats. Margin is the difference of the two largest probabilities. `chosen_` statistics,
    `chosen_confidence` among them, refer to the distribution that the token is chosen from, after temperature, top-k
    and top-p. The likeliest token is a statistic too, for samplers that draw tokens.
    """

    ENTROPY = "entropy"
    MARGIN = "margin"
    CHOSEN_CONFIDENCE = "chosen_confidence"
    CHOSEN_ENTROPY = "chosen_entropy"
    CHOSEN_MARGIN = "chosen_margin"
    LIKELIEST = "likeliest"


CHOSEN = frozenset({Statistic.CHOSEN_CONFIDENCE, Statistic.CHOSEN_ENTROPY, Statistic.CHOSEN_MARGIN})


@dataclass(frozen=True)
class LogitBonus:
    """Sparse additions to logits: int64 [b] rows of logits, int64 [b] tokens, float32 [b] values."""

    index: Tensor
    token: Tensor
    value: Tensor

    @classmethod
    def join(cls, parts: "Sequence[LogitBonus]") -> "LogitBonus":
        """Concatenate several, whose rows already share one origin."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("index", "token", "value")))

    def part(self, start: int, stop: int) -> "LogitBonus":
        """Additions to rows `start` to `stop` (exclusive) of logits, counted from `start`."""
        mine = (self.index >= start) & (self.index < stop)
        return LogitBonus(self.index[mine] - start, self.token[mine], self.value[mine])

    def to(self, device: torch.device) -> "LogitBonus":
        return LogitBonus(*(each.to(device, non_blocking=True) for each in (self.index, self.token, self.value)))


@dataclass(frozen=True)
class StatisticsRequest:
    """Statistics of n rows of logits besides token and confidence, and the choice of the token.

    Attributes:
        statistics: further statistics.
        only: bool [n] for a statistic (or "top") that only some rows request; it is undefined in the others.
        choices: one per row; None chooses greedily everywhere.
        uniform: float [n] in [0, 1), a random number per row; required if a choice has a temperature.
        top: number of largest probabilities; padded with zeros if the vocabulary is smaller.
        named: int64 [n, m], tokens whose probabilities to compute; 0 for those of -1.
        bonus: additions to the logits, applied first.
    """

    statistics: frozenset[Statistic] = frozenset()
    only: Mapping[str, Tensor] = field(default_factory=dict)
    choices: TokenChoices | None = None
    uniform: Tensor | None = None
    top: int = 0
    named: Tensor | None = None
    bonus: LogitBonus | None = None

    @property
    def columns(self) -> int:
        """Number of columns in the table of the prediction."""
        return 2 + len(self.statistics) + self.top + (0 if self.named is None else self.named.shape[1])

    @classmethod
    def join(
        cls, parts: "Sequence[StatisticsRequest]", counts: Sequence[int], device: torch.device | None = None
    ) -> "StatisticsRequest":
        """Concatenate several requests.

        Statistics that only some of them include are undefined in the rows of the others.

        Args:
            counts: number of rows of each request.
            device: device of the tensors; None is the CPU.
        """
        if len(parts) == 1:
            return parts[0]
        statistics = frozenset[Statistic]().union(*(part.statistics for part in parts))
        top, named = max(part.top for part in parts), None
        if tokens := [part.named for part in parts if part.named is not None]:
            named = torch.full((sum(counts), max(each.shape[1] for each in tokens)), -1, device=device)
        only: dict[str, Tensor] = {
            name: torch.zeros(sum(counts), dtype=torch.bool, device=device)
            for name in (*statistics, *(("top",) if top else ()))
        }
        choices: list[TokenChoices] = []
        uniform = torch.zeros(sum(counts), dtype=torch.float64, device=device)
        bonuses: list[LogitBonus] = []
        first = 0
        for part, count in zip(parts, counts, strict=True):
            stop = first + count
            for name, rows in only.items():
                if part.top if name == "top" else name in part.statistics:
                    rows[first:stop] = part.only.get(name, True)
            choices.append(part.choices or TokenChoices.of([GREEDY] * count, device))
            if part.uniform is not None:
                uniform[first:stop] = part.uniform
            if named is not None and part.named is not None:
                named[first:stop, : part.named.shape[1]] = part.named
            if part.bonus is not None:
                bonuses.append(replace(part.bonus, index=part.bonus.index + first))
            first = stop
        return cls(
            statistics=statistics,
            only={name: rows for name, rows in only.items() if not bool(rows.all())},
            choices=TokenChoices.cat(choices) if any(part.choices is not None for part in parts) else None,
            uniform=uniform if any(part.uniform is not None for part in parts) else None,
            top=top,
            named=named,
            bonus=LogitBonus.join(bonuses) if bonuses else None,
        )

    def part(self, start: int, stop: int) -> "StatisticsRequest":
        """Rows `start` to `stop` (exclusive)."""
        return replace(
            self,
            only={name: rows[start:stop] for name, rows in self.only.items()},
            choices=None if self.choices is None else self.choices[start:stop],
            uniform=None if self.uniform is None else self.uniform[start:stop],
            named=None if self.named is None else self.named[start:stop],
            bonus=None if self.bonus is None else self.bonus.part(start, stop),
        )

    def to(self, device: torch.device) -> "StatisticsRequest":
        """Move tensors to the device, except those whose values are inspected: that would wait for the device."""
        return replace(
            self,
            uniform=None if self.uniform is None else self.uniform.to(device, non_blocking=True),
            named=None if self.named is None else self.named.to(device, non_blocking=True),
        )


NOTHING = StatisticsRequest()
