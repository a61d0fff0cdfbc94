"""The seam between the denoising loop and where the model runs."""

from dataclasses import dataclass
from typing import Protocol

from samplers import BIDIRECTIONAL, AttentionPattern, CacheMode
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query


@dataclass(frozen=True)
class ModelInfo:
    """What the engine must know of a model.

    Attributes:
        architecture: class name in the checkpoint's `architectures`.
        max_length: longest canvas, in tokens.
        length_limit: the setting that makes it shorter than the model could do, if one does.
        vocab_size: rows of the head.
        mask_id, end_ids: special tokens; a model without a mask token has None.
        block_length: the family's default; None is full diffusion.
        device, dtype: where and how it computes.
        parameters: number of weights.
        caches: what a backend can keep between forwards.
        pattern: how it reads a canvas.
        resident: whether it reads and answers tensors on its device, so that the denoising loop runs there too.
    """

    architecture: str
    max_length: int
    vocab_size: int
    mask_id: int | None
    end_ids: frozenset[int]
    block_length: int | None
    device: str
    dtype: str
    parameters: int
    pattern: AttentionPattern = BIDIRECTIONAL
    caches: frozenset[CacheMode] = frozenset(CacheMode)
    length_limit: str | None = None
    resident: bool = True

    @property
    def loop_device(self) -> str:
        """Where the denoising loop keeps its tensors."""
        return self.device if self.resident else "cpu"

    def blocks(self, asked: int | None) -> int | None:
        """The block length that a request's comes to; for a causal model, none asked for is the model's own."""
        return asked or self.block_length if self.pattern.causal else asked

    @property
    def cache(self) -> CacheMode:
        """What is kept between forwards unless somebody chooses: all that can be kept exactly."""
        return CacheMode.PREFIX if self.pattern.causal else CacheMode.NONE

    @property
    def sampler(self) -> str:
        """What denoises unless somebody chooses."""
        return "threshold" if self.pattern.noise is None else "diffusion_gemma"


class BackendDeadError(Exception):
    """The model runs no more, and no later forward can succeed."""


class Backend(Protocol):
    """Runs the model. Called from the engine's thread only."""

    info: ModelInfo

    def predict(self, query: Query) -> Prediction:
        """One forward pass over the canvases of a query; what it asks of the positions it names, on its own device."""

    def close(self) -> None:
        """Give back what it holds."""
