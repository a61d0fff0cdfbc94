"""A prediction laid out by row and position, once for all samplers of a step."""

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samplers.contract import Step
from samplers.forward.prediction import Prediction
from samplers.forward.statistics import Statistic
from samplers.loop.row import Row

COUNTERS = ("seed", "forward", "block", "block_step", "block_masks")
_counted: Callable[[Row], tuple[int, ...]] = attrgetter("seed", "forwards", "block", "block_step", "block_masks")


class Grid:
    """What a forward says of generations, all tensors [rows, width], width being the longest generation region.

    Args:
        row, position: int64 [n], of what the prediction tells, as in `Query`.
    """

    def __init__(self, rows: Sequence[Row], row: Tensor, position: Tensor, prediction: Prediction) -> None:
        self._rows = rows
        layouts = [each.canvas.layout for each in rows]
        width = max(layout.gen_length for layout in layouts)
        at = row, position - torch.tensor([layout.prompt_length for layout in layouts])[row]

        def grid(values: Tensor, empty: float) -> Tensor:
            out = torch.full((len(rows), width, *values.shape[1:]), empty, dtype=values.dtype)
            out[at] = values
            return out

        candidates = [each.candidates() for each in rows]
        lines = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(each) for each in candidates]))
        self._candidate = torch.zeros(len(rows), width, dtype=torch.bool)
        self._candidate[lines, torch.cat(candidates)] = True
        self._masked = pad_sequence([each.canvas.masked for each in rows], batch_first=True)
        self._token = grid(prediction.token, -1)
        self._confidence = grid(prediction.confidence, -torch.inf)
        self._extra = {name: grid(values, torch.nan) for name, values in prediction.extra.items()}
        self._probability: Tensor | None = None
        if any(drawn := [each.judges_drawn for each in rows]):
            self._probability = self._confidence
            known = self._confidence > -torch.inf
            self._confidence = self._confidence.where(
                ~(torch.tensor(drawn)[:, None] & known), self._extra[Statistic.CHOSEN_CONFIDENCE]
            )
        self._top = None if prediction.top is None else grid(prediction.top, torch.nan)
        self._named = None if prediction.named is None else grid(prediction.named, 0.0)
        self._counters = torch.tensor([_counted(each) for each in rows])

    def step(self, members: Sequence[int]) -> Step:
        """The part of it that belongs to these rows, which share a sampler."""
        rows = [self._rows[i] for i in members]
        traits = rows[0].traits
        index = torch.tensor(members)

        def part(values: Tensor) -> Tensor:
            return values if len(members) == len(self._rows) else values[index]

        counters = part(self._counters)
        current = given = None
        if traits.revises:
            width = self._masked.shape[1]
            current = torch.full((len(rows), width), -1)
            given = torch.zeros(len(rows), width, dtype=torch.bool)
            for i, row in enumerate(rows):
                current[i, : len(row.given)] = row.canvas.generated
                given[i, : len(row.given)] = row.given
        return Step(
            candidate=part(self._candidate),
            masked=part(self._masked),
            token=part(self._token),
            confidence=part(self._confidence),
            extra={name: part(values) for name, values in self._extra.items() if name in traits.statistics},
            params=[row.params for row in rows],
            layouts=[row.canvas.layout for row in rows],
            top=part(self._top[:, :, : traits.top]) if self._top is not None and traits.top else None,
            states=[row.state for row in rows],
            named=None if self._named is None else part(self._named),
            probability=None if self._probability is None else part(self._probability),
            current=current,
            given=given,
            **{name: counters[:, i : i + 1] for i, name in enumerate(COUNTERS)},
        )
