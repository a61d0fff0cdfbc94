"""A model as evaluation and training see it: callables, so that `policies` imports none."""

from collections.abc import Callable
from dataclasses import dataclass

from samplers.denoising import Predict


@dataclass(frozen=True)
class Subject:
    """A model under test: a forward pass, its text codec, its special tokens, its longest canvas."""

    predict: Predict
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    mask_id: int
    end_ids: frozenset[int]
    max_length: int
