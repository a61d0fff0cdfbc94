"""What one forward pass says about each candidate position."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.forward.statistics import Statistic, StatisticsRequest


@dataclass(frozen=True)
class Prediction:
    """Statistics of one forward pass at all positions that were asked for, flattened over the batch's rows.

    Attributes:
        token: int64 [n], what would be committed; never the mask token.
        confidence: float32 [n], probability of that token under the model's unmodified distribution.
        extra: further statistics that were asked for, float32 [n] each.
        top: the largest probabilities, descending, float32 [n, as many as were asked for]; None where none were.
        named: probabilities of the tokens that were named, float32 [n, as many]; None where none were.
        failed: generations of the query whose own forward failed, by their place in it, and why. What is said of them
            is undefined.
    """

    token: Tensor
    confidence: Tensor
    extra: dict[Statistic, Tensor]
    top: Tensor | None = None
    named: Tensor | None = None
    failed: Mapping[int, Exception] = field(default_factory=dict)

    @classmethod
    def missing(cls, wanted: StatisticsRequest, rows: int, device: torch.device) -> "Prediction":
        """Zeros in place of what a forward that failed was asked."""
        zeros = torch.zeros(rows, device=device)
        return cls(
            zeros.long(),
            zeros,
            dict.fromkeys(wanted.statistics, zeros),
            zeros[:, None].expand(rows, wanted.top) if wanted.top else None,
            None if wanted.named is None else zeros[:, None].expand(wanted.named.shape),
        )

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

    def table(self, wanted: StatisticsRequest | None = None) -> Tensor:
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
