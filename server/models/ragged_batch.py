"""One forward pass over rows of different lengths without padding: packed tokens, attention row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class KeyValues:
    """Cached state of one canvas between forward passes.

    Attributes:
        states: rotated keys, and values, of all positions, for each layer [2, length, key heads, head_dim].
        self_conditioning: start of the drafted block, and the signal for the next forward pass, [positions, width];
            None before the first forward pass, and for networks without self-conditioning.
    """

    states: Sequence[Tensor]
    self_conditioning: tuple[int, Tensor] | None = None


@dataclass(frozen=True)
class Segment:
    """A row of a packed forward pass: all or part of a canvas.

    Attributes:
        start, stop: positions that are fed; all others are read from `memory`.
        wanted: number of fed positions whose hidden states are requested.
        visible: length of the prefix of the canvas that attention sees.
        memory: cache of this canvas. The fed positions are written to it; a row that feeds less than the visible prefix
            reads the rest from it.
        causal_block: block size of block-causal attention; None: every visible position is seen.
        draft: positions before this one are encoded causally.
    """

    start: int
    stop: int
    wanted: int
    visible: int
    memory: KeyValues | None = None
    causal_block: int | None = None
    draft: int = 0

    @property
    def fed(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.fed == self.visible

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the row. Whole rows of equal shape can share an attention call."""
        return self.fed, self.visible, self.causal_block or 0, self.draft


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of one shape side by side, with `count` queries each, at positions `places` [rows, 1, count, 1].

    `masks` caches the attention masks [rows, 1, count, keys] by sliding window; keys start at `first_key`.
    """

    rows: Sequence[Segment]
    count: int
    places: Tensor
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)

    def first_key(self, window: int | None) -> int:
        """First key that these queries can see; whole rows start at 0."""
        row = self.rows[0]
        return 0 if window is None or row.whole else max(0, min(row.start, row.draft) - window + 1)

    def mask(self, window: int | None) -> Tensor | None:
        if window not in self.masks:
            self.masks[window] = _mask(self.rows[0], self.places, window, self.first_key(window))
        return self.masks[window]


class RaggedBatch:
    """Rows of one forward pass. Neighbours of equal shape share an attention call.

    Args:
        rows: in the order of their tokens.
        tokens: ids [sum of fed] of each row's `start` to `stop`.
        wanted: indices into `tokens` [sum of wanted], row by row.

    `tokens` and `wanted` may be padded to reduce the number of shapes; the results beyond are meaningless.
    """

    def __init__(self, rows: Sequence[Segment], tokens: Tensor, wanted: Tensor) -> None:
        self.rows = rows
        self.tokens = tokens
        self.wanted = wanted
        position = torch.cat([torch.arange(row.start, row.stop) for row in rows])
        self.position = F.pad(position, (0, len(tokens) - len(position))).to(tokens.device)
        self._attention_groups = _attention_groups(rows, [row.fed for row in rows], self.position)
        self._last_groups = _attention_groups(rows, [row.wanted for row in rows], self.position[wanted])
        self._exact = len(tokens) == len(position) and len(wanted) == sum(row.wanted for row in rows)

    def attend(
        self,
        layer: int,
        last: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attention within each row, [queries, heads, head_dim], with grouped key and value heads.

        Args:
            last: True in the last layer, where `q` belongs to the wanted tokens only.
            q: queries of all tokens, or of the wanted ones.
            k, v: keys and values of all tokens, [tokens, key heads, head_dim].
            scale: factor of the products; None is 1 / sqrt(head_dim).
            window: size of the sliding window, which ends at the query; that of a draft ends at the draft's first
            position.
        """
        groups = self._last_groups if last else self._attention_groups
        out = None if len(groups) == 1 and self._exact else torch.zeros_like(q)
        asked = first = 0
        for group in groups:
            rows, fed = len(group.rows), group.rows[0].fed
            queries = slice(asked, asked + rows * group.count)
            keys = slice(first, first + rows * fed)
            asked, first = queries.stop, keys.stop
            row_k, row_v = k[keys], v[keys]
            for i, row in enumerate(group.rows):
                if row.memory is not None:
                    part = slice(i * fed, (i + 1) * fed)
                    row.memory.states[layer][0, row.start : row.stop] = row_k[part]
                    row.memory.states[layer][1, row.start : row.stop] = row_v[part]
            only = group.rows[0]
            if not only.whole:
                assert only.memory is not None
                row_k, row_v = only.memory.states[layer][:, group.first_key(window) : only.visible]
            mixed = F.scaled_dot_product_attention(
                _heads_first(q[queries], rows),
                _heads_first(row_k, rows),
                _heads_first(row_v, rows),
                attn_mask=group.mask(window),
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            ).transpose(1, 2)
            if out is None:
                return mixed.reshape(q.shape)
            out[queries].view(mixed.shape).copy_(mixed)
        assert out is not None
        return out


def _heads_first(x: Tensor, rows: int) -> Tensor:
    """[rows * length, heads, head_dim] to [rows, heads, length, head_dim]."""
    return x.view(rows, len(x) // rows, *x.shape[1:]).transpose(1, 2)  # works without tokens too


def _attention_groups(rows: Sequence[Segment], queries: Sequence[int], position: Tensor) -> list[AttentionGroup]:
    """Group neighbours of equal shape. A row that reads cached positions forms its own group.

    Args:
        queries: number of queries of each row.
        position: position on its canvas of each query.
    """
    groups: list[AttentionGroup] = []
    first = 0
    for (_, count), same in groupby(zip(rows, queries, strict=True), key=lambda each: (each[0].shape, each[1])):
        members = [row for row, _ in same]
        for batch in [members] if members[0].whole else [[row] for row in members]:
            places = position[first : first + count * len(batch)].view(len(batch), 1, count, 1)
            first += count * len(batch)
            groups.append(AttentionGroup(batch, count, places))
    return groups


def _mask(row: Segment, places: Tensor, window: int | None, first: int) -> Tensor | None:
    """Attention mask of the visible keys from `first` on for queries at `places`; None if all of them are seen."""
    size = row.causal_block
    if size is not None and row.start // size == (row.visible - 1) // size:
        size = None
    if window is not None and row.draft - window < first:
        window = None
    if size is window is None and row.start >= row.draft:
        return None
    keys = torch.arange(first, row.visible, device=places.device)
    sees = (keys <= places) | (places >= row.draft)
    if size is not None:
        sees &= keys // size <= places // size
    if window is not None:
        sees &= keys > places.clamp(max=row.draft) - window
    return sees
