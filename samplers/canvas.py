"""The canvas: prompt, generation region and what is still masked."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where things are on a canvas; fixed for a generation.

    Attributes:
        prompt_length: given tokens before the generation region.
        gen_length: positions of the generation region.
        suffix_length: given tokens after it (infilling).
        block_length: positions denoised together, blocks go left to right; `gen_length` is full diffusion.
    """

    prompt_length: int
    gen_length: int
    block_length: int
    suffix_length: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_length, self.suffix_length) < 0:
            raise ValueError("prompt and suffix cannot have a negative length")
        if self.gen_length < 1:
            raise ValueError(f"gen_length must be at least 1, got {self.gen_length}")
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")

    @property
    def length(self) -> int:
        """Positions of the whole canvas."""
        return self.prompt_length + self.gen_length + self.suffix_length

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may be shorter."""
        return -(-self.gen_length // self.block_length)

    def block_size(self, block: int) -> int:
        """Positions of one block."""
        return min(self.block_length, self.gen_length - block * self.block_length)


@dataclass(eq=False)
class Canvas:
    """Tokens of one generation and what is still masked.

    Attributes:
        layout: where things are.
        tokens: int64 [length]; masked positions hold the model's mask token.
        masked: bool [gen_length], relative to the generation region. A mask token in the prompt is just a token.
    """

    layout: Layout
    tokens: Tensor
    masked: Tensor = field(repr=False)

    @classmethod
    def blank(
        cls,
        prompt: list[int],
        gen_length: int,
        mask_id: int,
        block_length: int | None = None,
        suffix: list[int] | None = None,
    ) -> "Canvas":
        """A canvas whose whole generation region is masked. No `block_length` means full diffusion."""
        suffix = suffix or []
        layout = Layout(len(prompt), gen_length, min(block_length or gen_length, gen_length), len(suffix))
        tokens = torch.tensor([*prompt, *[mask_id] * gen_length, *suffix], dtype=torch.int64)
        return cls(layout, tokens, torch.ones(gen_length, dtype=torch.bool))

    @property
    def generated(self) -> Tensor:
        """View of the generation region's tokens, [gen_length]."""
        start = self.layout.prompt_length
        return self.tokens[start : start + self.layout.gen_length]

    @property
    def settled(self) -> int:
        """Length of the committed prefix of the generation region: what can no longer change."""
        return int(self.masked.int().argmax()) if bool(self.masked.any()) else self.layout.gen_length
