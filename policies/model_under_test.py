"""A model as evaluation and training see it: callables, so that `policies` imports none."""

from collections.abc import Callable
from dataclasses import dataclass

from samplers import BIDIRECTIONAL, AttentionPattern, Canvas
from samplers.forward.query import Predict


@dataclass(frozen=True)
class ModelUnderTest:
    """A model under test: a forward pass, its text codec, its special tokens, its longest canvas.

    `prompt` makes a problem's text the model's prompt, such as the message of a chat; None: as `encode` does. `pattern`
    is how the model reads a canvas.
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
        """Raise ValueError if a prompt of a task and what is to be generated are longer than the longest canvas."""
        if prompt_length + gen_length > self.max_length:
            raise ValueError(
                f"a prompt of task {task} has {prompt_length} tokens, which with a gen_length of {gen_length} is more "
                f"than the model's {self.max_length}"
            )
