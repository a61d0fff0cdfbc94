"""Tensors of the rows of a batch. They persist between steps; rows move in and out of slots."""

from collections.abc import Hashable, Sequence
from heapq import heappop, heappush
from typing import Any, Protocol

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.columns import ColumnSpec, columns_of
from samplers.contract import Modifier, Sampler, SamplerParams, StateSpec
from samplers.loop.numbers import COUNT
from samplers.loop.traits import Traits
from samplers.loop.view_canvas import ViewCanvas

NO_TOKEN = -1


class Layer:
    """Parameters and state, by slot, of a rule or of a modifier around it."""

    def __init__(self, owner: "Sampler[Any] | Modifier[Any]", specs: dict[str, StateSpec], spec: ColumnSpec) -> None:
        self.owner = owner
        self.specs = specs
        self.spec = spec
        self.params = torch.zeros(0, len(spec.kinds), dtype=torch.float64)
        self.state: dict[str, Tensor] = {}

    def resize(self, slots: int, region: int, device: torch.device) -> None:
        """Make room for this number of slots and positions; existing content stays."""
        self.params = _grown(self.params.to(device), (slots, len(self.spec.kinds)), 0)
        for name, spec in self.specs.items():
            old = self.state.get(name)
            last = spec.shape if old is None else tuple(old.shape[2:])
            shape = (slots, region + 1 if spec.per == "position" else 1, *last)
            if old is None:
                self.state[name] = torch.full(shape, spec.fill, dtype=spec.dtype, device=device)
            else:
                self.state[name] = _grown(old, shape, spec.fill)

    def reset(self, slots: Tensor | list[int], block_only: bool) -> None:
        """Reset state to its value before the first step of a generation, or of a block."""
        for name, spec in self.specs.items():
            if spec.lives == "block" or not block_only:
                kept = self.state[name]
                kept[slots] = torch.full((), spec.fill, dtype=spec.dtype, device=kept.device)

    def widen(self, name: str, last: int) -> None:
        """Extend the last dimension of a state to at least this length."""
        old = self.state[name]
        if self.specs[name].shape and old.shape[-1] < last:
            self.state[name] = _grown(old, (*old.shape[:-1], last), self.specs[name].fill)


class Group:
    """Rows with the same sampler and modifiers, which are evaluated together."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.count = 0


class Resident(Protocol):
    """The side of a row that its batch sees (see `Row` for the attributes)."""

    canvas: Canvas
    sampler: Sampler[Any]
    params: SamplerParams
    end_ids: frozenset[int]
    modifiers: Sequence[tuple[Modifier[Any], SamplerParams]]
    traits: Traits
    given: Tensor
    views: list[ViewCanvas]
    batch: "Batch | None"
    slot: int
    key: Hashable
    column_values: dict[int, list[float]]

    @property
    def all_params(self) -> list[SamplerParams]: ...

    @property
    def finished(self) -> bool: ...

    def first_numbers(self) -> Tensor: ...

    def read(self) -> None: ...

    def asked_bounds(self) -> tuple[int, int]: ...


class Batch:
    """Slots for rows: tokens [slots, canvas], masks [slots, region + 1], and a table of integers (see `N`).

    The last column of per-position tensors stands for no position and is never masked.

    A row's canvas is a view of its slot. Tensors are as long as the longest row needs and grow when a longer one is
    admitted.

    Attributes:
        causal, shifted, drafting, revising, keeping_state: True if some rows may have such models or rules; work that
            no row needs is skipped. Reset to False only when all rows have left.
        block_length: length of the longest block of any row since then.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.groups: dict[Hashable, Group] = {}
        self.version = 0
        self._clear()

    def _clear(self) -> None:
        self.rows: list[Resident | None] = []
        self._free: list[int] = []
        self.causal = self.shifted = self.drafting = self.revising = self.keeping_state = False
        self.block_length = 1
        self.tokens = torch.zeros(0, 0, dtype=torch.int64, device=self.device)
        self.masked = torch.zeros(0, 1, dtype=torch.bool, device=self.device)
        self.given = torch.ones(0, 1, dtype=torch.bool, device=self.device)
        self.numbers = torch.zeros(0, COUNT, dtype=torch.int64, device=self.device)
        self.ends = torch.full((0, 0), NO_TOKEN, dtype=torch.int64, device=self.device)
        self.places = torch.arange(1, device=self.device)

    @property
    def region(self) -> int:
        """Longest generation region that fits."""
        return self.masked.shape[1] - 1

    def admit(self, row: "Resident") -> None:
        """Move a row here from its current batch."""
        before, old = row.batch, row.slot
        if before is self:
            return
        layout, ends = row.canvas.layout, sorted(row.end_ids)
        slot = self._free_slot(layout.length, layout.gen_length, len(ends))
        group = self._group(row)
        group.count += 1
        self._note_kind(row)
        _fill_row(self.tokens[slot], row.canvas.tokens)
        if before is None:
            _fill_row(self.masked[slot], row.canvas.masked, False)
            _fill_row(self.given[slot], row.given, True)
            self.numbers[slot] = row.first_numbers()
            _fill_row(self.ends[slot], torch.tensor(ends, dtype=torch.int64), NO_TOKEN)
            for layer, params in zip(group.layers, row.all_params, strict=True):
                layer.params[slot] = torch.tensor(row.column_values[id(params)], dtype=torch.float64)
                layer.reset([slot], block_only=False)
        else:
            _fill_row(self.masked[slot], before.masked[old], False)
            _fill_row(self.given[slot], before.given[old], True)
            self.numbers[slot].copy_(before.numbers[old])
            _fill_row(self.ends[slot], before.ends[old, : len(ends)], NO_TOKEN)
            for layer, other in zip(group.layers, before.groups[row.key].layers, strict=True):
                layer.params[slot].copy_(other.params[old])
                layer.reset([slot], block_only=False)
                self._take_state(slot, layer, other, old, layout.gen_length)
            before._let_go(row)
        self.rows[slot] = row
        row.batch, row.slot = self, slot
        self._show(row)
        self.version += 1

    def _note_kind(self, row: "Resident") -> None:
        pattern, traits = row.canvas.layout.pattern, row.traits
        self.block_length = max(self.block_length, row.canvas.layout.block_length)
        self.causal |= pattern.causal
        self.shifted |= pattern.shifted
        self.drafting |= pattern.noise is not None
        self.revising |= traits.revises
        self.keeping_state |= any(traits.state)

    def _take_state(self, slot: int, layer: Layer, other: Layer, old: int, region: int) -> None:
        for name, spec in layer.specs.items():
            value = other.state[name][old].to(self.device)
            if spec.per == "position":
                value = value[:region]
            layer.widen(name, value.shape[-1])
            layer.state[name][slot][tuple(slice(0, size) for size in value.shape)] = value

    def release(self, row: "Resident") -> None:
        """Let a row leave, with a canvas of its own."""
        canvas = row.canvas
        canvas.tokens, canvas.masked = canvas.tokens.clone(), canvas.masked.clone()
        row.given = row.given.clone()
        self._let_go(row)
        if not self.groups:
            self._clear()

    def _let_go(self, row: "Resident") -> None:
        assert self.rows[row.slot] is row
        self.rows[row.slot] = None
        heappush(self._free, row.slot)
        group = self.groups[row.key]
        group.count -= 1
        if not group.count:
            del self.groups[row.key]
        self.version += 1

    def _group(self, row: "Resident") -> Group:
        group = self.groups.get(row.key)
        if group is None:
            owners: list[Sampler[Any] | Modifier[Any]] = [row.sampler, *(modifier for modifier, _ in row.modifiers)]
            layers = [
                Layer(owner, specs, columns_of(type(params)))
                for owner, specs, params in zip(owners, map(dict, row.traits.state), row.all_params, strict=True)
            ]
            for layer in layers:
                layer.resize(len(self.rows), self.region, self.device)
            group = self.groups[row.key] = Group(layers)
        return group

    def _free_slot(self, length: int, region: int, ends: int) -> int:
        slots = len(self.rows)
        if not self._free:
            slots = max(4, 2 * slots) if slots else 1
        if slots > len(self.rows) or length > self.tokens.shape[1] or region > self.region or ends > self.ends.shape[1]:
            self._resize(
                slots,
                max(length, self.tokens.shape[1]),
                max(region, self.region),
                max(ends, self.ends.shape[1]),
            )
        return heappop(self._free)

    def _resize(self, slots: int, length: int, region: int, ends: int) -> None:
        old = self.region
        self.tokens = _grown(self.tokens, (slots, length), 0)
        self.masked = _grown(self.masked, (slots, region + 1), 0)
        given = _grown(self.given[:, :old], (slots, region + 1), 1)
        self.given = given
        self.numbers = _grown(self.numbers, (slots, COUNT), 0)
        self.ends = _grown(self.ends, (slots, ends), NO_TOKEN)
        self.places = torch.arange(region + 1, device=self.device)
        if region > old:
            for group in self.groups.values():
                for layer in group.layers:  # the column for no position moves to the end
                    for name, spec in layer.specs.items():
                        if spec.per == "position":
                            layer.state[name][:, old] = spec.fill
        self._free += range(len(self.rows), slots)  # larger than all entries, so it stays a heap
        self.rows += [None] * (slots - len(self.rows))
        for group in self.groups.values():
            for layer in group.layers:
                layer.resize(slots, region, self.device)
        for row in self.rows:
            if row is not None:
                self._show(row)

    def _show(self, row: "Resident") -> None:
        """Make a row's canvas a view of its slot."""
        canvas: Canvas = row.canvas
        layout = canvas.layout
        canvas.tokens = self.tokens[row.slot, : layout.length]
        canvas.masked = self.masked[row.slot, : layout.gen_length]
        row.given = self.given[row.slot, : layout.gen_length]
        for view in row.views:
            view.canvas.tokens = view.canvas.tokens.to(self.device)
            view.canvas.masked = canvas.masked

    def reset_blocks(self, slots: Tensor) -> None:
        """Reset per-block state of rules in these slots."""
        for group in self.groups.values():
            for layer in group.layers:
                layer.reset(slots, block_only=True)


def _fill_row(row: Tensor, values: Tensor, rest: float = 0) -> None:
    """Write values to the beginning of a row, and `rest` to the remainder. What does not fit is left out."""
    size = len(values)
    if size == len(row):
        row.copy_(values)
        return
    row[:size].copy_(values[: len(row)])
    row[size:].fill_(rest)


def _grown(old: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    """A tensor of at least this shape with the old values at its beginning."""
    shape = tuple(max(have, want) for have, want in zip(old.shape, shape, strict=True))
    if shape == tuple(old.shape):
        return old
    out = old.new_full(shape, fill)
    out[tuple(slice(0, size) for size in old.shape)] = old
    return out
