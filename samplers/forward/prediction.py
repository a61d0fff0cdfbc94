"""Results of a forward pass at the requested positions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.forward.statistics import Statistic, StatisticsRequest


@dataclass(frozen=True)
class Prediction:
    """Statistics of one forward pass at all requested positions, flattened over the rows of the batch.

    Attributes:
        token: int64 [n], token to commit; never the mask token.
        confidence: float32 [n], probability of that token in the model's unmodified distribution.
        extra: further requested statistics, float32 [n] each.
        top: float32 [n, k], the k largest probabilities, descending; None if not requested.
        named: float32 [n, m], probabilities of the m named tokens; None if there are none.
        failed: generations whose own forward failed, by their index in the query, with the error. Their statistics are
            undefined.
    """

    token: Tensor
    confidence: Tensor
    extra: dict[Statistic, Tensor]
    top: Tensor | None = None
    named: Tensor | None = None
    failed: Mapping[int, Exception] = field(default_factory=dict)

    @classmethod
    def missing(cls, wanted: StatisticsRequest, rows: int, device: torch.device) -> "Prediction":
        """Zeros in place of the results of a failed forward."""
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
        """Concatenate several predictions."""
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
        """Rows `start` to `stop` (exclusive)."""
        return Prediction(
            self.token[start:stop],
            self.confidence[start:stop],
            {name: values[start:stop] for name, values in self.extra.items()},
            None if self.top is None else self.top[start:stop],
            None if self.named is None else self.named[start:stop],
        )

    def table(self, wanted: StatisticsRequest | None = None) -> Tensor:
        """All results, or the requested ones, side by side: float32 [n, columns].

        Token ids are exact in float32 up to a vocabulary of 2 ** 24.
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
        """Inverse of `table` for these statistics and numbers of largest and named probabilities; None for none."""
        names = sorted(statistics)
        widths = [1, 1, *[1] * len(names), *(width for width in (top, named) if width is not None)]
        token, confidence, *rest = torch.split(table, widths, dim=1)
        extra = {name: rest.pop(0)[:, 0] for name in names}
        largest = rest.pop(0) if top is not None else None
        return cls(token[:, 0].long(), confidence[:, 0], extra, largest, rest.pop(0) if rest else None)

    def cpu(self) -> "Prediction":
        """The prediction on the CPU, moved in one copy."""
        if self.token.device.type == "cpu":
            return self
        top, named = (None if values is None else values.shape[1] for values in (self.top, self.named))
        return Prediction.of_table(self.table().cpu(), self.extra, top, named)
