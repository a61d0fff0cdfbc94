"""Models for tests that are functions of the canvas alone, and cheap."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.summary import summarise

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
        each = [logits(canvas) for canvas in query.canvases]
        at = zip(query.row.tolist(), query.position.tolist(), strict=True)
        rows = torch.stack([each[row][position] for row, position in at])
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
