"""Our own model code on CPU or CUDA."""

import torch
from torch import Tensor

from samplers.canvas import Canvas
from samplers.denoising import Query
from samplers.prediction import Prediction, summarise
from server.engine.backend import ModelInfo
from server.models.llada import LLaDA

LOGIT_ELEMENTS = 1 << 26
"""Logits held at a time: candidates are worked off in chunks of at most this many elements."""


class TorchBackend:
    """Full forward each step; the last block's output, head and statistics for candidate positions only."""

    def __init__(self, network: LLaDA, info: ModelInfo) -> None:
        self.network = network.eval()
        self.info = info
        self.device = torch.device(info.device)

    @torch.inference_mode()
    def predict(self, query: Query) -> Prediction:
        tokens, valid = pad(query.canvases)
        wanted, place = gather(query.row, query.position, len(query.canvases))
        hidden = self.network.hidden(
            tokens.to(self.device, non_blocking=True),
            None if valid is None else valid.to(self.device, non_blocking=True),
            wanted.to(self.device, non_blocking=True),
        )
        row, place = query.row.to(self.device), place.to(self.device)
        uniform = None if query.uniform is None else query.uniform.to(self.device)
        size = max(1, LOGIT_ELEMENTS // self.info.vocab_size)
        parts = []
        for start in range(0, len(row), size):
            part = slice(start, start + size)
            logits = self.network.head(hidden[row[part], place[part]])
            parts.append(
                summarise(
                    logits,
                    self.info.mask_id,
                    query.statistics,
                    query.choices and query.choices[part],
                    None if uniform is None else uniform[part],
                    query.top,
                )
            )
        return Prediction(
            torch.cat([p.token for p in parts]).cpu(),
            torch.cat([p.confidence for p in parts]).cpu(),
            {name: torch.cat([p.extra[name] for p in parts]).cpu() for name in query.statistics},
            torch.cat([p.top for p in parts if p.top is not None]).cpu() if query.top else None,
        )

    def close(self) -> None:
        del self.network


def pad(canvases: list[Canvas]) -> tuple[Tensor, Tensor | None]:
    """Canvases as one [rows, length] tensor, padded at the right, and which positions are real (None: all)."""
    lengths = [canvas.layout.length for canvas in canvases]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.stack([canvas.tokens for canvas in canvases]), None
    tokens = torch.zeros(len(canvases), longest, dtype=torch.int64)
    for i, canvas in enumerate(canvases):
        tokens[i, : lengths[i]] = canvas.tokens
    return tokens, torch.arange(longest) < torch.tensor(lengths)[:, None]


def gather(row: Tensor, position: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Candidates as a grid: positions [rows, most candidates of a row], and where in its row's line each one stands.

    Lines of rows with fewer candidates are filled up with position 0. `row` ascends.
    """
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    grid = torch.zeros(rows, int(counts.max()), dtype=torch.int64)
    grid[row, place] = position
    return grid, place
