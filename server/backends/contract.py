"""Interface between the denoising loop and the runtime of the model."""

from dataclasses import dataclass
from typing import Protocol

from samplers import BIDIRECTIONAL, AttentionPattern, CacheMode
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query


@dataclass(frozen=True)
class ModelInfo:
    """Properties of a model that the engine needs.

    Attributes:
        architecture: class name in the checkpoint's `architectures`.
        max_length: longest canvas, in tokens.
        length_limit: setting that limits the canvas to less than the model supports, if any.
        vocab_size: rows of the output head.
        mask_id, end_ids: special tokens; `mask_id` is None for a model without a mask token.
        block_length: the family's default, in positions; None is full diffusion.
        device, dtype: where and in which type it computes.
        parameters: number of weights.
        caches: what the backend can keep between forward passes.
        pattern: attention pattern of a canvas.
        resident: whether the backend reads and answers tensors on its device, so that the loop runs there too.
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
        """Block length for a requested one. For a causal model, None selects the model's own."""
        return asked or self.block_length if self.pattern.causal else asked

    @property
    def cache(self) -> CacheMode:
        """Default cache mode: everything that can be cached exactly."""
        return CacheMode.PREFIX if self.pattern.causal else CacheMode.NONE

    @property
    def sampler(self) -> str:
        """Name of the default sampler."""
        return "threshold" if self.pattern.noise is None else "diffusion_gemma"


class BackendDeadError(Exception):
    """The model has stopped for good: no later forward pass can succeed."""


class Backend(Protocol):
    """Runs the model. All methods are called from the engine's thread."""

    info: ModelInfo

    def predict(self, query: Query) -> Prediction:
        """One forward pass over the canvases of a query; what it asks of the positions it names, on its own device."""

    def close(self) -> None:
        """Release all resources."""
