"""Rows that take a step together: their windows side by side, rows of one group neighbours."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samplers.columns import Columns, LayoutColumns
from samplers.contract import SamplerError, SamplerParams, StepContext
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import Statistic
from samplers.forward.token_choice import GREEDY, TokenChoices
from samplers.loop import guard
from samplers.loop.batch import Batch, Group
from samplers.loop.check import copied, one
from samplers.loop.numbers import N
from samplers.loop.row import Row


@dataclass
class Members:
    """The rows of a group in a part: `start` to before `stop`."""

    group: Group
    start: int
    stop: int
    rows: list[Row]
    columns: list[Columns]
    params: list[list[SamplerParams]]
    slots: Tensor
    row: Tensor
    layout: LayoutColumns

    @property
    def traits(self) -> guard.Traits:
        return self.rows[0].traits

    @property
    def owners(self) -> list[guard.Owner]:
        """The rule, and the modifiers around it."""
        return [layer.owner for layer in self.group.layers]


@dataclass
class Opened:
    """The windows of a part before a forward; tensors [rows, width], or [rows, 1].

    Attributes:
        numbers: the rows' integers, [rows, columns].
        position: region positions; past a window's end the one that stands for no position.
        masked, candidate, committed: see `StepContext`.
        block: positions of the active block.
        asked: positions that the forward is to tell of.
        opens: rows whose forward decides the block's first position only; None where there are none.
    """

    numbers: Tensor
    position: Tensor
    masked: Tensor
    candidate: Tensor
    committed: Tensor
    block: Tensor
    asked: Tensor
    opens: Tensor | None
    failed: dict[int, SamplerError] = field(default_factory=dict)
    named: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    judged: Tensor | None = None
    spans: list[list[ForwardSpan]] = field(default_factory=list)


def split(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by the width of what they look at, within factors of four, and then by group."""
    parts: dict[tuple[bool, int], dict[Any, list[Row]]] = {}
    for row in rows:
        parts.setdefault(row.part_key, {}).setdefault(row.key, []).append(row)
    return [[row for group in groups.values() for row in group] for groups in parts.values()]


def _layout(n: Tensor) -> LayoutColumns:
    length, prompt, gen, block_length, blocks, denoised, noise, strict = (
        n[:, each, None]
        for each in (N.LENGTH, N.PROMPT, N.GEN, N.BLOCK_LENGTH, N.BLOCKS, N.DENOISED, N.NOISE, N.STRICT)
    )
    return LayoutColumns(length, prompt, gen, block_length, blocks, denoised, noise, strict > 0)


class Part:
    """Rows of a batch that take a step together, for as long as the same rows do.

    Whatever does not change from step to step is gathered once: slots, lengths, parameters, choices.
    """

    def __init__(self, batch: Batch, rows: list[Row]) -> None:
        self.batch, self.rows = batch, rows
        device = batch.device
        self.slots = torch.tensor([row.slot for row in rows], device=device)
        self.region = rows[0].part_key[0]
        layouts = [row.canvas.layout for row in rows]
        self.width = max(row.window_width for row in rows)
        self.zero_based = self.region or all(layout.blocks == 1 for layout in layouts)
        self.shifted = any(layout.pattern.shifted for layout in layouts)
        self.offset = torch.arange(self.width, device=device)
        self.positions = self.offset.expand(len(rows), self.width)
        self.nowhere = torch.zeros(len(rows), self.width, dtype=torch.bool, device=device)
        self.everywhere = ~self.nowhere
        n = batch.numbers[self.slots]
        self.static = n
        self.prompt = n[:, N.PROMPT, None]
        self.flat_tokens = self.slots * batch.tokens.shape[1] + n[:, N.PROMPT]
        self.flat_masks = self.slots * batch.masked.shape[1]
        self.members = self._members()
        self.wide = [row.traits.whole_region or row.traits.revises for row in rows]
        self.any_wide = any(self.wide)
        self.wide_rows = torch.tensor(self.wide, device=device)[:, None]
        self.revising = any(row.traits.revises for row in rows)
        self.reviewed = self.revising or not all(row.traits.ours for row in rows)
        self.drafting = any(row.traits.drafts for row in rows)
        self.keeping = [i for i, row in enumerate(rows) if row.keeps]
        ends = {row.end_ids for row in rows}
        self.ends: tuple[int, ...] | None = tuple(ends.pop()) if len(ends) == 1 else None
        self.judging = any(layout.pattern.judges_drawn for layout in layouts)
        self.judges = torch.tensor([layout.pattern.judges_drawn for layout in layouts], device=device)
        self._bounds: tuple[list[tuple[int, int]], Tensor, Tensor] | None = None

    def _members(self) -> list[Members]:
        found: list[Members] = []
        start = 0
        while start < len(self.rows):
            key = self.rows[start].key
            stop = start
            while stop < len(self.rows) and self.rows[stop].key == key:
                stop += 1
            group, slots = self.batch.groups[key], self.slots[start:stop]
            columns = [Columns(layer.spec, layer.params[slots]) for layer in group.layers]
            rows = self.rows[start:stop]
            params = [[row.all_params[i] for row in rows] for i in range(len(columns))]
            layout = _layout(self.static[start:stop])
            found.append(Members(group, start, stop, rows, columns, params, slots, slots[:, None], layout))
            start = stop
        return found

    @cached_property
    def choices(self) -> TokenChoices | None:
        """How each row's tokens are chosen; None where all take the likeliest, of everything."""
        each = [row.choice for row in self.rows]
        return None if all(choice == GREEDY for choice in each) else TokenChoices.of(each, self.batch.device)

    @cached_property
    def statistics(self) -> dict[str, Tensor | None]:
        """What is wanted beside token and confidence, and the rows that want it, bool [rows]; None: all of them."""
        wishes: dict[str, list[bool]] = {}
        for i, row in enumerate(self.rows):
            own = set(row.traits.statistics)
            if row.canvas.layout.pattern.judges_drawn and (row.choice.temperature > 0 or row.traits.any_has("choice")):
                own.add(Statistic.CHOSEN_CONFIDENCE)
            for name in (*own, *(("top",) if row.traits.top else ())):
                wishes.setdefault(name, [False] * len(self.rows))[i] = True
        return {
            name: None if all(wish) else torch.tensor(wish, device=self.batch.device) for name, wish in wishes.items()
        }

    def open(self) -> Opened:
        """Gather the rows' windows."""
        batch, slots = self.batch, self.slots
        n = batch.numbers.index_select(0, slots)
        start, stop = n[:, N.START, None], n[:, N.STOP, None]
        if self.zero_based:
            position = self.positions
            masked = batch.masked[:, : self.width].index_select(0, slots)
        else:
            position = start + self.offset
            position.masked_fill_(position >= stop, batch.region)
            masked = batch.masked.view(-1)[self.flat_masks[:, None] + position]
        block = (position >= start) & (position < stop) if self.region else self.everywhere
        candidate = masked & block if self.region else masked
        committed = self.nowhere
        if self.reviewed:
            if self.zero_based:
                given = batch.given[:, : self.width].index_select(0, slots)
            else:
                given = batch.given.view(-1)[self.flat_masks[:, None] + position]
            committed = block & ~(masked | given)
        opened = Opened(n, position, masked, candidate, committed, block, candidate, None)
        self._place_windows(opened)
        if self.shifted:
            opens = [row.opens_block() for row in self.rows]
            if any(opens):
                opened.opens = torch.tensor(opens, device=batch.device)[:, None]
                opened.candidate = opened.candidate & (~opened.opens | (position == start))
        opened.asked = opened.candidate
        if self.any_wide:
            low, high = self._asked_bounds()
            wide = self.wide_rows if opened.opens is None else self.wide_rows & ~opened.opens
            opened.asked = torch.where(wide, (position >= low) & (position < high), opened.candidate)
        return opened

    def _asked_bounds(self) -> tuple[Tensor, Tensor]:
        """Region positions that rows which ask for more than candidates are told of, [rows, 1] each."""
        bounds = [row.asked_bounds() if wide else (0, 0) for row, wide in zip(self.rows, self.wide, strict=True)]
        if self._bounds is None or self._bounds[0] != bounds:
            columns = torch.tensor(bounds, device=self.batch.device)
            self._bounds = bounds, columns[:, :1], columns[:, 1:]
        return self._bounds[1], self._bounds[2]

    def _place_windows(self, opened: Opened) -> None:
        """Let rules say where their candidates are."""
        for members in self.members:
            if "window" not in members.traits.hooks[0]:
                continue
            asked = self.ask(opened, members, 0, lambda context, m=members: guard.window(m.owners[0], context))
            for index, found in asked:
                if found is None:
                    continue
                n, position, block = opened.numbers[index], opened.position[index], opened.block[index]
                settled = n[:, N.SETTLED, None]
                start, stop = found.start.minimum(settled), found.stop.maximum(settled + 1)
                inside = opened.masked[index] & (position >= start) & (position < stop)
                confined = n[:, N.CONFINED, None] > 0
                candidate = opened.candidate.clone()
                candidate[index] = torch.where(confined, inside & block, inside)
                opened.candidate = candidate

    def context(
        self, opened: Opened, members: Members, layer: int, kind: Callable[..., Any] = StepContext, **more: Any
    ) -> Any:
        """What a rule (layer 0) or a modifier sees of its rows."""
        a, b = members.start, members.stop
        n = opened.numbers[a:b]
        everything = len(self.rows) == b - a

        def part(values: Tensor) -> Tensor:
            return values if everything else values[a:b]

        position = part(opened.position)
        slots = members.slots
        c = n[:, : N.SLOT + 1].split(1, dim=1)
        return kind(
            candidate=part(opened.candidate),
            masked=part(opened.masked),
            committed=part(opened.committed),
            position=position,
            seed=c[N.SEED],
            forward=c[N.STEPS],
            block=c[N.BLOCK],
            block_start=c[N.START],
            block_step=c[N.BLOCK_STEP],
            block_masks=c[N.BLOCK_MASKS],
            slot=c[N.SLOT],
            layout=members.layout,
            params=members.params[layer],
            columns=members.columns[layer],
            state=self.state(members, layer, slots, position),
            canvas=self.batch.tokens,
            row=members.row,
            **more,
        )

    def state(self, members: Members, layer: int, slots: Tensor, position: Tensor) -> dict[str, Tensor]:
        """What a rule or modifier keeps of these rows, in their windows."""
        own, found = members.group.layers[layer], {}
        for name, spec in own.specs.items():
            kept = own.state[name]
            if spec.per == "row":
                found[name] = kept[slots]
            elif self.zero_based:
                found[name] = kept[slots][:, : self.width]
            else:
                found[name] = kept[slots[:, None], position]
        return found

    def keep(
        self, opened: Opened, members: Members, layer: int, index: Tensor | None, states: dict[str, Tensor]
    ) -> None:
        """Write new state of some rows of the part, or of all members."""
        own = members.group.layers[layer]
        at = slice(members.start, members.stop) if index is None else index
        slots, position = self.slots[at], opened.position[at]
        for name, value in states.items():
            own.widen(name, value.shape[-1])
            kept, spec = own.state[name], own.specs[name]
            if spec.shape and kept.shape[-1] > value.shape[-1]:
                value = torch.nn.functional.pad(value, (0, kept.shape[-1] - value.shape[-1]), value=spec.fill)
            if spec.per == "row":
                kept[slots] = value
            else:
                kept[slots[:, None], position] = value
                if not self.zero_based:  # what was written where no position is
                    kept[slots, -1] = torch.tensor(spec.fill, dtype=spec.dtype, device=kept.device)

    def ask(
        self, opened: Opened, members: Members, layer: int, hook: Callable[[StepContext[Any]], Any]
    ) -> list[tuple[Tensor, Any]]:
        """A hook's answers with the rows of the part that each is for; where all together fail, each row alone."""
        context = self.context(opened, members, layer)
        ours = guard.is_ours(type(members.owners[layer]))
        index = torch.arange(members.start, members.stop, device=self.batch.device)
        try:
            return [(index, hook(context if ours else copied(context)))]
        except SamplerError as error:
            if len(index) == 1:
                opened.failed.setdefault(members.start, error)
                return []
        found = []
        for i in range(len(index)):
            try:
                found.append((index[i : i + 1], hook(one(context, i) if ours else copied(one(context, i)))))
            except SamplerError as error:
                opened.failed.setdefault(members.start + i, error)
        return found
