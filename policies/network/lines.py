"""The positions of a batch that a network computes."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from samplers.loop.masks import counts_of, places

FEW = 0.75
"""Share of the positions up to which computing only the wanted ones pays."""


@dataclass(frozen=True)
class Lines:
    """Lines of a network's input, and the positions that they stand for.

    Conditions are numbered through all rows, two for each: of committed and of masked positions.

    Attributes:
        shape: rows and width of the batch.
        which: int64 [lines], the condition of each line; [rows, width] if each position has its own line.
        valid: bool [rows, width], positions that exist; None: all do.
        holds: int64 [rows * width], the line of each position; None: each has its own, in order.
        wanted: lines whose output is needed, int64 [n] or a slice; None: all.
        places: int64 [n], the positions of the wanted lines among all of the batch, ascending; None: all.
        masked_only: outputs are needed of masked positions only; others may come out wrong.
    """

    shape: tuple[int, int]
    which: Tensor
    valid: Tensor | None
    holds: Tensor | None = None
    wanted: Tensor | slice | None = None
    places: Tensor | None = None
    masked_only: bool = False

    @classmethod
    def every(cls, masked: Tensor, valid: Tensor | None) -> "Lines":
        """One line for each position of bool [rows, width]."""
        return cls((len(masked), masked.shape[1]), conditions_of(masked), valid)

    @classmethod
    def known(cls, masked: Tensor, valid: Tensor | None, known: Tensor) -> "Lines":
        """Two lines for each row, of an unknown committed and an unknown masked position, and then the known positions.

        Args:
            known: int64 [n], positions whose inputs differ in more than their mask bit.
        """
        rows, width = masked.shape
        which, first = conditions_of(masked).flatten(), torch.arange(2 * rows, device=masked.device)
        own = torch.arange(2 * rows, 2 * rows + len(known), device=masked.device)
        holds = which.index_copy(0, known, own)
        which = torch.cat([first, which.index_select(0, known)])
        return cls((rows, width), which, valid, holds, slice(2 * rows, None), known)

    def asking(self, wanted: Tensor | None) -> "Lines":
        """The same lines where outputs of these masked positions only are needed, int64 [n]; None: of all masked."""
        # Wanted positions are among the places, if only some are there.
        if wanted is None or (self.places is not None and len(self.places) == len(wanted)):
            return replace(self, masked_only=True)
        lines = wanted if self.holds is None else self.holds.index_select(0, wanted)
        return replace(self, places=wanted, wanted=lines, masked_only=True)

    def spread(self, table: Tensor) -> Tensor:
        """A row of the table, [2 * rows, hidden], for each wanted line, by its condition."""
        if self.masked_only and self.places is None:
            return table[1::2, None]
        which = self.which if self.wanted is None else self.which.flatten()[self.wanted]
        return F.embedding(which, table)

    @cached_property
    def columns(self) -> Tensor | None:
        """Column of each wanted position, int64 [n]."""
        return None if self.places is None else self.places % self.shape[1]

    @cached_property
    def counts(self) -> list[int] | None:
        """Number of wanted positions of each row; None: all."""
        rows, width = self.shape
        return None if self.places is None else counts_of(self.places // width, rows)


def conditions_of(masked: Tensor) -> Tensor:
    """The condition of each position among those of all rows, int64 [rows, width]."""
    return masked + torch.arange(0, 2 * len(masked), 2, device=masked.device)[:, None]


def some(wanted: Tensor) -> Tensor | None:
    """True positions of bool [rows, width], int64 [n]; None if they are most: all are to be computed.

    Only on the CPU: elsewhere to wait for their number takes longer than to compute the others.
    """
    if wanted.device.type != "cpu":
        return None
    found = places(wanted)
    return None if len(found) > FEW * wanted.numel() else found
