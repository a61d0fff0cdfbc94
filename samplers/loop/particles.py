"""Generations with several canvases: barriers, resampling, and the choice of a winner."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch

from samplers.canvas import Canvas
from samplers.contract import Resampling, SamplerError, Slots
from samplers.loop import hooks
from samplers.loop.batch import Resident
from samplers.loop.cache_plan import CachePlan
from samplers.loop.event import StepEvent
from samplers.loop.numbers import N
from samplers.randomness import BARRIER, uniform


class Lane(Resident, Protocol):
    """The side of a row that the other canvases of its generation see (see `Row` for the attributes)."""

    seed: int
    told: list[int]
    reported: int
    view_count: int

    @property
    def block(self) -> int: ...

    @property
    def lane_finished(self) -> bool: ...

    def text_tokens(self) -> list[int]: ...

    def release(self) -> None: ...

    def forked(self) -> list[CachePlan]: ...

    def take_plans(self, plans: list[CachePlan]) -> None: ...


L = TypeVar("L", bound=Lane)


@dataclass(eq=False)
class Particles(Generic[L]):
    """Canvases of a generation, the row itself among them.

    Their commits are reported when all have ended, since any of them may win until then. The forward passes of all
    canvases count.

    Attributes:
        lanes: one row per canvas.
        forwards: number of forward passes of all canvases.
        events: per canvas, the events that led to its current content.
        won: index of the canvas that becomes the generation's, once all have ended.
    """

    lanes: list[L]
    forwards: int = 0
    barriers: int = 0
    won: int | None = None

    def __post_init__(self) -> None:
        self.events: list[list[StepEvent]] = [[] for _ in self.lanes]
        self._blocks = [lane.block for lane in self.lanes]

    @property
    def active(self) -> list[L]:
        """Canvases that take part in the next forward: those not waiting at a barrier."""
        ahead = min((lane.block for lane in self.lanes if not lane.lane_finished), default=0)
        per_step = self.lanes[0].traits.barrier == "step"
        return [lane for lane in self.lanes if not lane.lane_finished and (per_step or lane.block == ahead)]

    def after(self, events: Mapping[L, StepEvent]) -> list[StepEvent]:
        """Events of the generation after a step of some of its canvases."""
        taking = [i for i, lane in enumerate(self.lanes) if lane in events]
        for i in taking:
            if (error := events[self.lanes[i]].error) is not None:
                return [StepEvent(error=error)]
        self.forwards += sum(self.lanes[i].view_count for i in taking)
        for i in taking:
            event = events[self.lanes[i]]
            self.events[i].append(replace(event, forward=self.forwards, settled=0, text_tokens=[]))
        try:
            self._barrier(taking)
            if all(lane.lane_finished for lane in self.lanes):
                return self._end()
        except SamplerError as error:
            return [StepEvent(error=error)]
        return [StepEvent(self.forwards)]

    def _barrier(self, taking: list[int]) -> None:
        """Resample canvases once all have reached the end of a step or block."""
        rule = self.lanes[0].sampler
        if self.lanes[0].traits.barrier == "block":
            passed = [
                lane.lane_finished or lane.block > was for lane, was in zip(self.lanes, self._blocks, strict=True)
            ]
            if not all(passed):
                return
        finished = [lane.lane_finished for lane in self.lanes]
        if not all(finished):
            found = hooks.resample(rule, self._slots())
            if found is not None:
                self._take_over(found)
        self._blocks = [lane.block for lane in self.lanes]
        self.barriers += 1

    def _slots(self) -> Slots:
        row = self.lanes[0]
        batch = row.batch
        assert batch is not None
        slots = torch.tensor([lane.slot for lane in self.lanes], device=batch.device)
        layer = batch.groups[row.key].layers[0]
        seed, number, zero = (torch.tensor(value, device="cpu") for value in (row.seed, self.barriers, 0))
        return Slots(
            params=row.params,
            state={name: layer.state[name][slots] for name, spec in layer.specs.items() if spec.per == "row"},
            uniform=float(uniform(seed, number, zero, BARRIER)),
            finished=torch.tensor([lane.lane_finished for lane in self.lanes], device=batch.device),
        )

    def _take_over(self, found: Resampling) -> None:
        """Continue canvases from their ancestors. Each keeps its own random stream."""
        lanes = self.lanes
        batch = lanes[0].batch
        assert batch is not None
        froms = found.ancestors.tolist()
        slots = torch.tensor([lane.slot for lane in lanes], device=batch.device)
        old = slots[found.ancestors]
        own = batch.numbers[slots][:, [N.SEED, N.SLOT]]
        for tensor in (batch.tokens, batch.masked, batch.numbers):
            tensor[slots] = tensor[old]
        batch.numbers[slots[:, None], torch.tensor([N.SEED, N.SLOT], device=batch.device)] = own
        for layer in batch.groups[lanes[0].key].layers:
            for kept in layer.state.values():
                kept[slots] = kept[old]
        for name, value in found.state.items():
            batch.groups[lanes[0].key].layers[0].state[name][slots] = value
        if froms == list(range(len(froms))):
            return
        told = [list(lanes[i].told) for i in froms]
        plans = {i: lanes[ancestor].forked() for i, ancestor in enumerate(froms) if ancestor != i}
        self.events = [list(self.events[i]) for i in froms]
        for i, lane in enumerate(lanes):
            lane.read()
            lane.told = told[i]
            lane.reported = len(lane.told)
            if i in plans:
                lane.take_plans(plans[i])

    def _end(self) -> list[StepEvent]:
        """Make the winning canvas the generation's, and report all of its events."""
        row = self.lanes[0]
        winner = hooks.winner(row.sampler, self._slots(), len(self.lanes))
        self.won = winner
        found, batch = self.lanes[winner], row.batch
        assert batch is not None
        events = self.events[winner]
        batch.tokens[row.slot], batch.masked[row.slot] = batch.tokens[found.slot], batch.masked[found.slot]
        batch.numbers[row.slot] = batch.numbers[found.slot]
        row.read()
        row.told = list(found.told)
        row.reported = len(row.told)
        events[-1].forward = self.forwards
        events[-1].settled = len(row.told)
        events[-1].text_tokens = row.text_tokens()
        for lane in self.lanes[1:]:
            lane.release()
        return events


def copies_of(canvas: Canvas, count: int) -> list[Canvas]:
    """Copies of a canvas, each with its own tensors."""
    return [Canvas(canvas.layout, canvas.tokens.clone(), canvas.masked.clone()) for _ in range(count)]
