"""Rows that take a step together: windows side by side, rows of one group adjacent."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.columns import Columns, LayoutColumns
from samplers.contract import Modifier, Sampler, SamplerParams
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import TokenChoices
from samplers.loop.batch import Batch, Group
from samplers.loop.masks import anywhere
from samplers.loop.numbers import LAYOUT, N
from samplers.loop.row import Row
from samplers.loop.traits import Traits

Groups = Sequence[list[Row]]
"""Rows by sampler and modifiers."""


def split(rows: Sequence[Row]) -> list[Groups]:
    """Rows grouped by window width, within factors of four, and then by sampler and modifiers."""
    parts: dict[tuple[bool, int], dict[Any, list[Row]]] = {}
    for row in rows:
        parts.setdefault(row.part_key, {}).setdefault(row.key, []).append(row)
    return [list(groups.values()) for groups in parts.values()]


@dataclass
class Members:
    """Rows `start` to `stop` (exclusive) of a part, which form its group `number`."""

    number: int
    start: int
    stop: int
    rows: list[Row]
    group: Group
    traits: Traits
    params: list[list[SamplerParams]]
    columns: list[Columns]
    slots: Tensor
    row: Tensor
    seed: Tensor
    slot: Tensor
    layout: LayoutColumns

    @classmethod
    def of(cls, batch: Batch, rows: list[Row], number: int, start: int, slots: Tensor, static: Tensor) -> "Members":
        """Members for these rows; `slots` [rows] and `static` [rows, columns] are those of the rows."""
        group = batch.groups[rows[0].key]
        params: list[list[SamplerParams]] = [[row.params for row in rows]]
        params += [[row.modifiers[i][1] for row in rows] for i in range(len(group.layers) - 1)]
        columns = [Columns(layer.spec, layer.params.index_select(0, slots)) for layer in group.layers]
        layout = static[:, LAYOUT].unsqueeze(2).unbind(1)
        gen, block_length, blocks, noise, length, prompt, denoised, strict, seed, slot = layout
        return cls(
            number,
            start,
            start + len(rows),
            rows,
            group,
            rows[0].traits,
            params,
            columns,
            slots,
            slots[:, None],
            seed,
            slot,
            LayoutColumns(length, prompt, gen, block_length, blocks, denoised, noise, strict > 0),
        )

    @property
    def sampler(self) -> Sampler[Any]:
        """The rule."""
        found: Sampler[Any] = self.rows[0].sampler
        return found

    @property
    def modifiers(self) -> list[Modifier[Any]]:
        """Modifiers around the rule, in order."""
        return [modifier for modifier, _ in self.rows[0].modifiers]

    def asking(self, hook: str) -> Iterator[tuple[int, Any]]:
        """Layers that override this method: the rule (0) and modifiers, by number."""
        for layer, hooks in enumerate(self.traits.hooks):
            if hook in hooks:
                yield layer, self.group.layers[layer].owner


class _Grids(NamedTuple):
    """Constants of windows: columns [width], those of all rows and their rows [rows * width], masks [rows, width]."""

    offset: Tensor
    positions: Tensor
    row: Tensor
    nowhere: Tensor
    everywhere: Tensor


@lru_cache(maxsize=8)
def _grids(rows: int, width: int, device: torch.device) -> _Grids:
    """Constants of windows, shared by all parts of this size. They are never written to."""
    offset = torch.arange(width, device=device)
    positions = offset.expand(rows, width).contiguous()
    row = torch.arange(rows, device=device)[:, None].expand(rows, width).reshape(-1)
    nowhere = torch.zeros(rows, width, dtype=torch.bool, device=device)
    return _Grids(offset, positions, row, nowhere, ~nowhere)


class Part:
    """Rows of a batch that take a step together, for as long as the set of rows stays the same.

    Values that do not change between steps are gathered once: slots, lengths, parameters, choices.
    """

    def __init__(self, batch: Batch, groups: Groups) -> None:
        self.batch = batch
        self.rows = rows = [row for group in groups for row in group]
        self.sizes = [len(group) for group in groups]
        self.slots = torch.tensor([row.slot for row in rows], device=batch.device)
        self.static = static = batch.numbers.index_select(0, self.slots)
        self._least, self._most = torch.stack(static.aminmax(dim=0)).tolist()
        self._read_traits([group[0].traits for group in groups])
        self._gather()
        self.members: list[Members] = []
        start = 0
        for number, group in enumerate(groups):
            stop = start + len(group)
            self.members.append(Members.of(batch, group, number, start, self.slots[start:stop], static[start:stop]))
            start = stop
        ends = {row.end_ids for row in rows}
        self.ends: tuple[int, ...] | None = tuple(ends.pop()) if len(ends) == 1 else None
        self._bounds: tuple[list[tuple[int, int]], Tensor, Tensor] | None = None

    def _read_traits(self, traits: list[Traits]) -> None:
        """Collect features that some rows need; steps of parts without them skip the work."""
        least, most = self._least, self._most
        self.region = self.rows[0].part_key[0]
        self.width = most[N.WINDOW]
        self.zero_based = self.region or most[N.BLOCKS] == 1
        self.even = least[N.EVEN] > 0 and least[N.WINDOW] == self.width
        self.shifted = most[N.SHIFTED] > 0
        self.judging = most[N.JUDGES] > 0
        self.spans_stay = least[N.SPANS_STAY] > 0
        self.one_view = all(row.view_count == 1 for row in self.rows)
        self.keeping = [i for i, row in enumerate(self.rows) if row.keeps] if most[N.KEEPS] else []
        self.any_wide = any(each.whole_region or each.revises for each in traits)
        self.revising = any(each.revises for each in traits)
        self.drafting = any(each.drafts for each in traits)
        self.blank = least[N.BLANK] > 0 and not (self.region or self.revising or most[N.NOISE])
        self.reviewed = self.revising or not all(each.ours for each in traits)

    def _gather(self) -> None:
        """Compute the indices of the windows in the batch's tensors."""
        shape = (len(self.rows), self.width)
        self.text, self.gen = self.static[:, N.TEXT], self.static[:, N.GEN]
        self.prompt, self.block_length = self.static[:, N.PROMPT], self.static[:, N.BLOCK_LENGTH]
        self.causal = self.static[:, N.CAUSAL]
        self.flat_tokens = self.slots * self.batch.tokens.shape[1] + self.prompt
        self.flat_masks = self.slots * self.batch.masked.shape[1]
        grids = _grids(*shape, self.batch.device)
        self.offset, self.positions, self.row_grid = grids.offset, grids.positions, grids.row
        self.nowhere, self.everywhere = grids.nowhere, grids.everywhere

    @property
    def plain(self) -> bool:
        """True if steps only commit candidates for good."""
        return not (self.revising or self.drafting)

    @cached_property
    def canvas_places(self) -> Tensor:
        """Canvas positions of windows that begin at the region's start, int64 [rows, width]."""
        return self.positions + self.prompt[:, None]

    @cached_property
    def wide_rows(self) -> Tensor:
        """Rows with statistics of more than candidates, bool [rows, 1]."""
        wide = [row.traits.whole_region or row.traits.revises for row in self.rows]
        return torch.tensor(wide, device=self.batch.device)[:, None]

    @cached_property
    def bounds(self) -> Tensor:
        """First row of each group, and the end of the last, int64 [groups + 1]."""
        return torch.tensor([0, *(members.stop for members in self.members)], device=self.batch.device)

    @cached_property
    def canvases(self) -> list[Canvas]:
        """Canvases of the rows."""
        return [row.canvas for row in self.rows]

    @cached_property
    def _same_spans(self) -> list[list[ForwardSpan]]:
        return [row.spans() for row in self.rows]

    def spans(self) -> list[list[ForwardSpan]]:
        """Spans of the next forward for each row's canvas and its further views."""
        return self._same_spans if self.spans_stay else [row.spans() for row in self.rows]

    @cached_property
    def choices(self) -> TokenChoices | None:
        """Token choice of each row; None if all are greedy and unfiltered."""
        if self._least[N.GREEDY]:
            return None
        return TokenChoices.of([row.choice for row in self.rows], self.batch.device)

    @cached_property
    def judged(self) -> Tensor | None:
        """Rows whose confidence is that of the distribution of their drawn token, bool [rows]; None if there are
        none."""
        if not self.judging or self.choices is None:
            return None
        return self.judged_with(self.choices)

    def judged_with(self, choices: TokenChoices) -> Tensor | None:
        """The same for the given token choices."""
        found = (self.static[:, N.JUDGES] > 0) & (choices.temperature > 0)
        return found if anywhere(found) else None

    @cached_property
    def statistics(self) -> dict[str, Tensor | None]:
        """Statistics requested besides token and confidence, with the rows that request them, bool [rows]; None:
        all."""
        wishes: dict[str, list[bool]] = {}
        nobody = [False] * len(self.rows)
        for members in self.members:
            own = {*members.traits.statistics, *(("top",) if members.traits.top else ())}
            for name in own:
                wishes.setdefault(name, list(nobody))[members.start : members.stop] = [True] * len(members.rows)
            if self.judging:
                chooses = members.traits.any_has("choice")
                for i, row in enumerate(members.rows, members.start):
                    if row.canvas.layout.pattern.judges_drawn and (chooses or row.choice.temperature > 0):
                        wishes.setdefault(Statistic.CHOSEN_CONFIDENCE, list(nobody))[i] = True
        device = self.batch.device
        return {name: None if all(wish) else torch.tensor(wish, device=device) for name, wish in wishes.items()}

    def asked_bounds(self) -> tuple[Tensor, Tensor]:
        """Region positions covered for rows that request more than candidates: start and stop, [rows, 1] each."""
        bounds = [row.asked_bounds() if row.traits.whole_region or row.traits.revises else (0, 0) for row in self.rows]
        if self._bounds is None or self._bounds[0] != bounds:
            columns = torch.tensor(bounds, device=self.batch.device)
            self._bounds = bounds, columns[:, :1], columns[:, 1:]
        return self._bounds[1], self._bounds[2]
