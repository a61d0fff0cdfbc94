"""Open windows of a part, and the positions that the next forward covers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from samplers.contract import SamplerError
from samplers.forward.span import ForwardSpan
from samplers.loop.masks import places
from samplers.loop.numbers import CONTEXT, N
from samplers.loop.part import Members, Part


@dataclass
class Opened:
    """Windows of a part before a forward; tensors [rows, width], or [rows, 1].

    Attributes:
        numbers: integers of the rows, [rows, columns].
        position: region positions; past a window's end, the one that stands for no position.
        masked, candidate, committed: see `StepContext`.
        block: mask of positions in the active block.
        opens: rows whose forward decides only the block's first position; None if there are none.
        asked: mask of positions that the forward covers.
        flat: indices of those positions in the flattened windows, int64 [n].
        row: their rows, int64 [n].
        failed: rows whose sampler failed, with the error.
        named: columns of the named tokens, by group and layer.
        judged: rows whose confidence is that of the distribution their token was drawn from, bool [rows]; None if there
            are none.
    """

    numbers: Tensor
    position: Tensor
    masked: Tensor
    candidate: Tensor
    committed: Tensor
    block: Tensor
    opens: Tensor | None = None
    asked: Tensor = field(init=False)
    flat: Tensor = field(init=False)
    row: Tensor = field(init=False)
    spans: list[list[ForwardSpan]] = field(default_factory=list)
    failed: dict[int, SamplerError] = field(default_factory=dict)
    named: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    judged: Tensor | None = None
    _pieces: dict[str, tuple[Tensor, Sequence[Tensor]]] = field(default_factory=dict)
    _columns: list[Sequence[Tensor]] = field(default_factory=list)

    def piece(self, name: str, values: Tensor, part: Part, members: Members) -> Tensor:
        """Rows of a group in a tensor [rows, ...], cached by name."""
        if len(part.sizes) == 1:
            return values
        found = self._pieces.get(name)
        if found is None or found[0] is not values:
            found = self._pieces[name] = values, values.split_with_sizes(part.sizes)
        return found[1][members.number]

    def columns(self, part: Part, members: Members) -> Sequence[Tensor]:
        """Integers of a group's rows that rules can see, one [rows, 1] for each of the first columns of `N`."""
        if not self._columns:
            columns = self.numbers[:, :CONTEXT].unsqueeze(2)
            self._columns = [each.unbind(1) for each in columns.split_with_sizes(part.sizes)]
        return self._columns[members.number]

    def asked_positions(self) -> Tensor:
        """Region positions that the forward covers, int64 [n]."""
        return self.position.view(-1).index_select(0, self.flat)


def open_windows(part: Part) -> Opened:
    """Gather the current windows of a part's rows."""
    batch, slots = part.batch, part.slots
    n = batch.numbers.index_select(0, slots)
    block = part.everywhere
    if part.zero_based:
        position = part.positions
        masked = batch.masked[:, : part.width].index_select(0, slots)
        if part.region:
            block = (position >= n[:, N.START, None]) & (position < n[:, N.STOP, None])
    else:
        position = n[:, N.START, None] + part.offset
        if not part.even:
            position.masked_fill_(position >= n[:, N.STOP, None], batch.region)
        masked = _at(batch.masked, part, position)
    candidate = masked & block if part.region else masked
    committed = part.nowhere
    if part.reviewed:
        given = _at(batch.given, part, position)
        committed = block & ~(masked | given)
    return Opened(n, position, masked, candidate, committed, block)


def _at(flags: Tensor, part: Part, position: Tensor) -> Tensor:
    """Flags of the rows at region positions, [rows, width]."""
    place = (part.flat_masks[:, None] + position).view(-1)
    return flags.view(-1).index_select(0, place).view(position.shape)


def settle_asked(part: Part, opened: Opened) -> None:
    """Determine the positions that the forward covers, once the candidates are known."""
    if part.shifted:
        opens = [row.opens_block() for row in part.rows]
        if any(opens):
            opened.opens = torch.tensor(opens, device=part.batch.device)[:, None]
            at_start = opened.position == opened.numbers[:, N.START, None]
            opened.candidate = opened.candidate & (~opened.opens | at_start)
    opened.asked = opened.candidate
    if part.any_wide:
        low, high = part.asked_bounds()
        wide = part.wide_rows if opened.opens is None else part.wide_rows & ~opened.opens
        inside = (opened.position >= low) & (opened.position < high)
        opened.asked = torch.where(wide, inside, opened.candidate)
    opened.flat = places(opened.asked)
    opened.row = part.row_grid.index_select(0, opened.flat)
