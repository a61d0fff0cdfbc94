"""A model as evaluation and training see it: callables, so that `policies` imports none."""

from collections.abc import Callable
from dataclasses import dataclass

from samplers import BIDIRECTIONAL, Scheme
from samplers.denoising import Predict


@dataclass(frozen=True)
class Subject:
    """A model under test: a forward pass, its text codec, its special tokens, its longest canvas.

    `template` makes a problem's text the model's prompt, such as the message of a chat; `scheme` is how the model reads
    a canvas.
    """

    predict: Predict
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    mask_id: int | None
    end_ids: frozenset[int]
    max_length: int
    template: Callable[[str], str] = str
    scheme: Scheme = BIDIRECTIONAL

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a problem's prompt."""
        return self.encode(self.template(text))
