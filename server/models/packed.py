"""Rows of different lengths and ages in one forward without padding: tokens side by side, attention row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class KeyValues:
    """Keys, rotated, and values of every position of one canvas, [layers, 2, length, key heads, head_dim]."""

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
        visible: length of the part of the canvas that attention reads.
        memory: what is kept of this canvas. A row that feeds all that is visible fills it, any other one reads it, with
            the part that it feeds put in its place.
        causal_block: a position sees no block of so many after its own; None: it sees everything visible.
    """

    start: int
    stop: int
    wanted: int
    visible: int
    memory: KeyValues | None = None
    causal_block: int | None = None

    @property
    def fed(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.fed == self.visible

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows of one shape, all of them whole, can share a call of attention."""
        return self.fed, self.visible, self.causal_block or 0


@dataclass(frozen=True)
class _Run:
    """Rows of one shape side by side, how many queries each has, and which keys those see, [rows, 1, count, keys]."""

    rows: Sequence[Row]
    count: int
    mask: Tensor | None


class Packed:
    """One forward's rows. Rows of equal shape should be neighbours: their attention is one call.

    Args:
        rows: in the order of their tokens.
        tokens: ids [sum of fed], each row's `start` to `stop`.
        wanted: indices into `tokens` [sum of wanted], row by row.

    `tokens` and `wanted` may be longer, so that few shapes occur; what is beyond is computed for nothing.
    """

    def __init__(self, rows: Sequence[Row], tokens: Tensor, wanted: Tensor) -> None:
        self.rows = rows
        self.tokens = tokens
        self.wanted = wanted
        position = torch.cat([torch.arange(row.start, row.stop) for row in rows])
        self.position = F.pad(position, (0, len(tokens) - len(position))).to(tokens.device)
        self._runs = _runs(rows, [row.fed for row in rows], self.position)
        self._last_runs = _runs(rows, [row.wanted for row in rows], self.position[wanted])
        self._exact = len(tokens) == len(position) and len(wanted) == sum(row.wanted for row in rows)

    def attend(self, layer: int, last: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within each row, [queries, heads, head_dim]; several heads of queries may share one of keys.

        Args:
            last: whether it is the last layer, in which `q` is of the wanted tokens only.
            q: of all tokens, or of the wanted ones.
            k, v: of all tokens, [tokens, key heads, head_dim].
        """
        runs = self._last_runs if last else self._runs
        out = None if len(runs) == 1 and self._exact else torch.zeros_like(q)
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
                row_k, row_v = only.memory.states[layer, :, : only.visible]
            mixed = F.scaled_dot_product_attention(
                _heads_first(q[queries], rows),
                _heads_first(row_k, rows),
                _heads_first(row_v, rows),
                attn_mask=run.mask,
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(1, 2)
            if out is None:
                return mixed.reshape(q.shape)
            out[queries].view(mixed.shape).copy_(mixed)
        assert out is not None
        return out


def _heads_first(x: Tensor, rows: int) -> Tensor:
    """[rows * length, heads, head_dim] to [rows, heads, length, head_dim]."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


def _runs(rows: Sequence[Row], queries: Sequence[int], position: Tensor) -> list[_Run]:
    """Neighbours that share a shape; a row with a past of its own stands alone.

    Args:
        queries: how many each row has.
        position: of every query on its canvas.
    """
    runs: list[_Run] = []
    first = 0
    for (_, count), same in groupby(zip(rows, queries, strict=True), key=lambda each: (each[0].shape, each[1])):
        members = [row for row, _ in same]
        for batch in [members] if members[0].whole else [[row] for row in members]:
            places = position[first : first + count * len(batch)].view(len(batch), 1, count, 1)
            first += count * len(batch)
            runs.append(_Run(batch, count, _mask(batch[0], places)))
    return runs


def _mask(row: Row, places: Tensor) -> Tensor | None:
    """Which of the visible positions each of these places sees; None where that is all of them."""
    size = row.causal_block
    if size is None or row.start // size == (row.visible - 1) // size:
        return None
    keys = torch.arange(row.visible, device=places.device)
    return keys // size <= places // size
