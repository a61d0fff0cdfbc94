"""The denoising loop: from rows and predictions to the next canvases, until all rows have ended.

Independent of model and queue: the engine, evaluation, training and tests all drive it with a `predict`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from samplers.contract import SamplerError
from samplers.forward.prediction import Prediction
from samplers.forward.query import Predict, Query
from samplers.loop.advancing import advance, blame_bonus
from samplers.loop.asking import ask
from samplers.loop.batch import Batch
from samplers.loop.event import ForwardError, StepEvent
from samplers.loop.part import Part, split
from samplers.loop.row import Row, lanes_of
from samplers.loop.views import together

Turn = list[tuple[Row, StepEvent]]
"""Rows that took part in a step, each with its event."""
Rows = Sequence[Row] | Callable[[], Sequence[Row]]


def run(
    rows: Rows, predict: Predict, *, batch: Batch | None = None, may_wait: bool = False, at_once: int | None = None
) -> Iterator[Turn]:
    """Denoise generations, one forward pass per step for all of them. Yields each step.

    A generation that cannot go on gets an error in its event and leaves; the others are not affected. Exceptions of
    `predict` end the loop.

    Args:
        rows: generations to run to their end, or a callable that returns those of the next step, none to end.
        batch: batch to move the rows to; they stay there until they are released.
        may_wait: True if a sampler may commit nothing (`Selection.waits`), for drivers that bound the number of
            forwards.
        at_once: maximum rows per forward if `rows` is a sequence; as one ends, the next begins.
    """
    loop = Loop(batch or Batch(), may_wait)
    if callable(rows):
        while taking := rows():
            yield loop.step(taking, predict)
        return
    left = [row for row in rows if not row.finished]
    while left:
        turn = loop.step(left[: at_once or len(left)], predict)
        yield turn
        gone = {id(row) for row, event in turn if row.finished or event.error is not None}
        if gone:
            left = [row for row in left if id(row) not in gone]


def finish(rows: Sequence[Row], predict: Predict, at_once: int | None = None) -> None:
    """Run these generations to their end. Raises SamplerError if one of them cannot go on."""
    for turn in run(rows, predict, at_once=at_once):
        for _, event in turn:
            if event.error is not None:
                raise event.error


def next_query(rows: Sequence[Row]) -> Query:
    """The query of the next step of these rows, which stay as they are."""
    batch = Batch()
    lanes = lanes_of(rows)
    for row in lanes:
        batch.admit(row)
    return together([ask(Part(batch, part))[0] for part in split(lanes)])


class Loop:
    """Steps of rows in a batch. Parts are rebuilt only when the set of rows changes."""

    def __init__(self, batch: Batch, may_wait: bool) -> None:
        self._batch = batch
        self._may_wait = may_wait
        self._lanes: list[Row] = []
        self._version = -1
        self._parts: list[Part] = []
        self._order: list[int] | None = None

    def _arrange(self, lanes: list[Row]) -> None:
        """Admit rows and sort them into parts, if they are others than in the last step."""
        if self._version == self._batch.version and self._lanes == lanes:
            return
        for row in lanes:
            if row.batch is not self._batch:
                self._batch.admit(row)
        if len(set(lanes)) < len(lanes):
            raise ValueError("a row is given twice for one step")
        self._parts = [Part(self._batch, groups) for groups in split(lanes)]
        sorted_rows = [row for part in self._parts for row in part.rows]
        self._order = None
        if sorted_rows != lanes:
            place = {row: i for i, row in enumerate(sorted_rows)}
            self._order = [place[row] for row in lanes]
        self._lanes, self._version = lanes, self._batch.version

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], predict: Predict) -> Turn:
        """Run one forward pass of these rows, none of them finished. Raises all errors except those of samplers."""
        several = any(row.particles for row in rows)
        lanes = lanes_of(rows) if several else list(rows)
        self._arrange(lanes)
        parts = self._parts
        asked = [ask(part) for part in parts]
        query = together([each for each, _ in asked])
        prediction = predict(query)
        events: list[StepEvent] = []
        first = canvas = 0
        for part, (own, opened) in zip(parts, asked, strict=True):
            count = own.answers
            mine = prediction if len(parts) == 1 else prediction.part(first, first + count)
            broken = blame_bonus(part, own.wanted, opened, mine)
            if prediction.failed:
                broken |= _failed(part, prediction, canvas)
            events += advance(part, opened, mine, self._may_wait, broken)
            first += count
            canvas += own.generations
        if self._order is not None:
            events = [events[i] for i in self._order]
        turn = list(zip(lanes, events, strict=True))
        if not several:
            return turn
        by_lane = dict(turn)
        return [each for row in rows for each in _of_row(row, by_lane)]


def _failed(part: Part, prediction: Prediction, first: int) -> dict[int, SamplerError]:
    """Errors of rows whose forward pass failed."""
    found: dict[int, SamplerError] = {}
    for i in range(len(part.rows)):
        if (cause := prediction.failed.get(first + i)) is not None:
            found[i] = ForwardError(f"the forward pass failed: {type(cause).__name__}")
            found[i].__cause__ = cause
    return found


def _of_row(row: Row, events: dict[Row, StepEvent]) -> Turn:
    if row.particles is None:
        return [(row, events[row])]
    return [(row, event) for event in row.particles.after(events)]
