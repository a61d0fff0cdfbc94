"""Models for tests that are functions of the canvas alone, and cheap."""

import zlib
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.forward.prediction import Prediction
from samplers.forward.query import Predict, Query
from samplers.forward.summary import summarise
from samplers.loop.event import StepEvent
from samplers.loop.row import Row
from samplers.loop.run import run

MASK, VOCAB = 0, 12
Logits = Callable[[Canvas], Tensor]
"""A canvas to logits [length, vocab]."""


def random_logits(canvas: Canvas, scale: float = 3.0) -> Tensor:
    """Logits that look random, and change with every token of the canvas."""
    seed = zlib.crc32(repr(canvas.tokens.tolist()).encode())
    return torch.randn(canvas.layout.length, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def predictor(logits: Logits = random_logits, mask_id: int | None = MASK) -> Callable[[Query], Prediction]:
    """`predict` for the loop, asking `logits` for one canvas after the other."""

    def predict(query: Query) -> Prediction:
        assert len(query.row), "an empty question"
        each = [logits(canvas) for canvas in query.canvases]
        at = zip(query.row.tolist(), query.position.tolist(), strict=True)
        rows = torch.stack([each[row][position] for row, position in at])
        if query.mixture is not None:
            rows = torch.cat([part.mix(rows[part.asked]) for part in query.mixture.parts(7)])
        return summarise(rows, mask_id, query.wanted)

    return predict


def scripted(script: dict[int, tuple[int, float]], offset: int = 0) -> Logits:
    """A model that puts a given token at each position with a given confidence, whatever else is on the canvas."""

    def logits(canvas: Canvas) -> Tensor:
        out = torch.zeros(canvas.layout.length, VOCAB)
        for position, (token, confidence) in script.items():
            rest = (1 - confidence) / (VOCAB - 1)
            out[position + offset] = torch.tensor(rest).log()
            out[position + offset, token] = torch.tensor(confidence).log()
        return out

    return logits


def turn(rows: Sequence[Row], predict: Predict, may_wait: bool = False) -> list[StepEvent]:
    """One step of rows, none of them finished: what it did to each."""
    return [event for _, event in next(run(list(rows), predict, may_wait=may_wait))]


def events_of(rows: Sequence[Row], predict: Predict, most: int = 1000) -> list[list[StepEvent]]:
    """Run to the end, but for at most so many steps: the events of each row."""
    found: list[list[StepEvent]] = [[] for _ in rows]
    place = {id(row): i for i, row in enumerate(rows)}
    for each in islice(run(rows, predict), most):
        for row, event in each:
            found[place[id(row)]].append(event)
    return found
