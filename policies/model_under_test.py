"""A model as evaluation and training see it: callables, so that `policies` imports none."""

from collections.abc import Callable
from dataclasses import dataclass

from samplers import BIDIRECTIONAL, AttentionPattern, Canvas
from samplers.forward.query import Predict


@dataclass(frozen=True)
class ModelUnderTest:
    """A forward pass with its text codec and special tokens.

    Attributes:
        mask_id: None for a model without a mask token.
        max_length: positions of the longest canvas.
        prompt: token ids of a problem's text as a prompt, such as a chat message; None: as `encode` does.
        pattern: how the model reads a canvas.
    """

    predict: Predict
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    mask_id: int | None
    end_ids: frozenset[int]
    max_length: int
    prompt: Callable[[str], list[int]] | None = None
    pattern: AttentionPattern = BIDIRECTIONAL

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a problem's prompt."""
        return self.encode(text) if self.prompt is None else self.prompt(text)

    def canvas(self, prompt: list[int], gen_length: int, block_length: int | None) -> Canvas:
        """A canvas with everything to generate masked, no longer than the model's context."""
        return Canvas.blank(
            prompt, gen_length, self.mask_id, block_length, pattern=self.pattern, max_length=self.max_length
        )

    def check_length(self, task: str, prompt_length: int, gen_length: int) -> None:
        """Raise ValueError if prompt and generation region of a task do not fit the longest canvas."""
        if prompt_length + gen_length > self.max_length:
            raise ValueError(
                f"a prompt of task {task} has {prompt_length} tokens, which with a gen_length of {gen_length} is more "
                f"than the model's {self.max_length}"
            )
