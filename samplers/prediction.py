"""What one forward pass says about each candidate position."""

from collections.abc import Iterable, Mapping, Sequence
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

    @classmethod
    def join(cls, parts: "Sequence[Bonus]") -> "Bonus":
        """All of several, whose rows are already counted from the same one."""
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in ("index", "token", "value")))

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

    @property
    def columns(self) -> int:
        """Columns of the table that a prediction of this makes."""
        return 2 + len(self.statistics) + self.top + (0 if self.named is None else self.named.shape[1])

    @classmethod
    def join(cls, parts: "Sequence[Wanted]", counts: Sequence[int]) -> "Wanted":
        """All rows of several, which have so many each. What only some of them want, the others get as well or not."""
        if len(parts) == 1:
            return parts[0]
        statistics = frozenset[Statistic]().union(*(part.statistics for part in parts))
        top, named = max(part.top for part in parts), None
        if tokens := [part.named for part in parts if part.named is not None]:
            named = torch.full((sum(counts), max(each.shape[1] for each in tokens)), -1)
        only: dict[str, Tensor] = {
            name: torch.zeros(sum(counts), dtype=torch.bool) for name in (*statistics, *(("top",) if top else ()))
        }
        choices: list[TokenChoice] = []
        uniform = torch.zeros(sum(counts), dtype=torch.float64)
        bonuses: list[Bonus] = []
        first = 0
        for part, count in zip(parts, counts, strict=True):
            stop = first + count
            for name, rows in only.items():
                if part.top if name == "top" else name in part.statistics:
                    rows[first:stop] = part.only.get(name, True)
            choices += part.choices or [TokenChoice()] * count
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
            choices=choices if any(part.choices is not None for part in parts) else None,
            uniform=uniform if any(part.uniform is not None for part in parts) else None,
            top=top,
            named=named,
            bonus=Bonus.join(bonuses) if bonuses else None,
        )

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

    def part(self, start: int, stop: int) -> "Prediction":
        """Of rows `start` to `stop`."""
        return Prediction(
            self.token[start:stop],
            self.confidence[start:stop],
            {name: values[start:stop] for name, values in self.extra.items()},
            None if self.top is None else self.top[start:stop],
            None if self.named is None else self.named[start:stop],
        )

    def table(self, wanted: Wanted | None = None) -> Tensor:
        """All of it, or what is wanted of it, side by side: float32 [n, columns].

        Token ids fit float32 exactly up to a vocabulary of 2 ** 24.
        """
        names: Iterable[Statistic] = self.extra
        top, named = self.top, self.named
        if wanted is not None:
            names = wanted.statistics
            top = None if top is None or not wanted.top else top[:, : wanted.top]
            named = None if named is None or wanted.named is None else named[:, : wanted.named.shape[1]]
        columns = [self.token.float()[:, None], self.confidence[:, None]]
        columns += [self.extra[name][:, None] for name in sorted(names)]
        columns += [values for values in (top, named) if values is not None]
        return torch.cat(columns, dim=1)

    @classmethod
    def of_table(
        cls, table: Tensor, statistics: Iterable[Statistic], top: int | None, named: int | None
    ) -> "Prediction":
        """The opposite of `table`: of these statistics, and so many of the largest and of the named; None for none."""
        names = sorted(statistics)
        widths = [1, 1, *[1] * len(names), *(width for width in (top, named) if width is not None)]
        token, confidence, *rest = torch.split(table, widths, dim=1)
        extra = {name: rest.pop(0)[:, 0] for name in names}
        largest = rest.pop(0) if top is not None else None
        return cls(token[:, 0].long(), confidence[:, 0], extra, largest, rest.pop(0) if rest else None)

    def cpu(self) -> "Prediction":
        """On the CPU, in one copy."""
        if self.token.device.type == "cpu":
            return self
        top, named = (None if values is None else values.shape[1] for values in (self.top, self.named))
        return Prediction.of_table(self.table().cpu(), self.extra, top, named)
