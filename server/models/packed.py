"""Rows of different lengths and ages in one forward without padding: tokens side by side, attention row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class KeyValues:
    """Keys, rotated, and values of every position of one canvas, [layers, 2, length, heads, head_dim]."""

    states: Tensor

    @property
    def nbytes(self) -> int:
        return self.states.nbytes


@dataclass(frozen=True)
class Row:
    """A canvas in a packed forward.

    Attributes:
        start, stop: positions of the canvas that are fed; the others are known from `memory`.
        wanted: how many of them are asked for.
        memory: what is kept of this canvas. A row that feeds everything fills it, any other one reads it, with the
            part that it feeds put in its place.
        length: of the whole canvas.
    """

    start: int
    stop: int
    wanted: int
    length: int
    memory: KeyValues | None = None

    @property
    def fed(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.fed == self.length


@dataclass(frozen=True)
class _Run:
    """Rows of one shape side by side, and how many queries each has."""

    rows: Sequence[Row]
    count: int


class Packed:
    """One forward's rows. Rows of equal shape should be neighbours: their attention is one call.

    Args:
        rows: in the order of their tokens.
        tokens: ids [sum of fed], each row's `start` to `stop`.
        wanted: indices into `tokens` [sum of wanted], row by row.
    """

    def __init__(self, rows: Sequence[Row], tokens: Tensor, wanted: Tensor) -> None:
        self.rows = rows
        self.tokens = tokens
        self.wanted = wanted
        self.position = torch.cat([torch.arange(row.start, row.stop) for row in rows]).to(tokens.device)
        self._runs = _runs(rows, all_queries=True)
        self._last_runs = _runs(rows, all_queries=False)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Bidirectional attention within each row, [queries, heads, head_dim].

        Args:
            q: of all tokens, or of the wanted ones.
            k, v: of all tokens, [tokens, heads, head_dim].
        """
        everything = len(q) == len(k)
        runs = self._runs if everything else self._last_runs
        out = None if len(runs) == 1 else q.new_empty(q.shape)
        asked = first = 0
        for run in runs:
            rows, fed = len(run.rows), run.rows[0].fed
            queries = slice(asked, asked + rows * run.count)
            keys = slice(first, first + rows * fed)
            asked, first = queries.stop, keys.stop
            row_k, row_v = k[keys], v[keys]
            for i, row in enumerate(run.rows):
                if row.memory is not None:
                    part = slice(i * fed, (i + 1) * fed)
                    row.memory.states[layer, 0, row.start : row.stop] = row_k[part]
                    row.memory.states[layer, 1, row.start : row.stop] = row_v[part]
            only = run.rows[0]
            if not only.whole:
                assert only.memory is not None
                row_k, row_v = only.memory.states[layer]
            shape = (rows, -1, *q.shape[1:])
            mixed = F.scaled_dot_product_attention(
                q[queries].view(shape).transpose(1, 2),
                row_k.view(shape).transpose(1, 2),
                row_v.view(shape).transpose(1, 2),
            )
            if out is None:
                return mixed.transpose(1, 2).reshape(q.shape)
            out[queries].view(shape).copy_(mixed.transpose(1, 2))
        assert out is not None
        return out


def _runs(rows: Sequence[Row], all_queries: bool) -> list[_Run]:
    """Neighbours that share a shape; a row with a past of its own stands alone."""
    runs: list[_Run] = []

    def shape(row: Row) -> tuple[int, int]:
        return row.fed, row.fed if all_queries else row.wanted

    for (_, count), same in groupby(rows, key=shape):
        for whole, members in groupby(same, key=lambda row: row.whole):
            batch = list(members)
            runs += [_Run(batch, count)] if whole else [_Run([row], count) for row in batch]
    return runs
