"""The canvas: prompt, generation region and what is still masked."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from samplers.attention_pattern import BIDIRECTIONAL, AttentionPattern


@dataclass(frozen=True)
class Layout:
    """Where things are on a canvas; fixed for a generation.

    Attributes:
        prompt_length: given tokens before the generation region.
        gen_length: positions of the generation region.
        suffix_length: given tokens after it (infilling).
        block_length: positions denoised together, blocks go left to right; `gen_length` is full diffusion. Blocks are
            counted from the generation region's start, but from the canvas's where the pattern is block-causal: the
            first then holds the end of the prompt.
        pattern: how the model reads it.
        cut: positions at the region's end that are denoised with their block and are no part of the text.
    """

    prompt_length: int
    gen_length: int
    block_length: int
    suffix_length: int = 0
    pattern: AttentionPattern = BIDIRECTIONAL
    cut: int = 0

    def __post_init__(self) -> None:
        if min(self.prompt_length, self.suffix_length) < 0:
            raise ValueError("prompt and suffix cannot have a negative length")
        if self.gen_length < 1:
            raise ValueError(f"gen_length must be at least 1, got {self.gen_length}")
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")
        if not 0 <= self.cut < self.gen_length:
            raise ValueError(f"{self.cut} of {self.gen_length} positions cannot be cut off")
        if self.pattern.causal_block is not None and self.pattern.causal_block % self.block_length:
            raise ValueError(f"blocks of {self.block_length} do not divide those of {self.pattern.causal_block}")

    @cached_property
    def twin(self) -> "Layout":
        """An equal one for samplers to see, made once: nothing that they do to it changes this one."""
        return replace(self, pattern=replace(self.pattern))

    @property
    def length(self) -> int:
        """Positions of the whole canvas."""
        return self.prompt_length + self.gen_length + self.suffix_length

    @property
    def denoised_length(self) -> int:
        """Positions of all blocks, where they are whole; what a schedule of one position a step takes for steps."""
        return self.gen_length if self.pattern.causal_block is None else self.blocks * self.block_length

    @property
    def text_length(self) -> int:
        """Longest text of the generation region, in tokens."""
        return self.gen_length - self.cut

    @property
    def missing(self) -> int:
        """Positions that the last block lacks of a whole one, because the context ended."""
        return self.pattern.region_length(self.prompt_length, self.text_length, self.block_length) - self.gen_length

    @property
    def shared(self) -> int:
        """Positions of the first block that belong to the prompt."""
        return 0 if self.pattern.causal_block is None else self.prompt_length % self.block_length

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may be shorter."""
        return -(-(self.gen_length + self.shared) // self.block_length)

    def block_place(self, block: int) -> int:
        """First position of a block on the canvas; the prompt may hold it."""
        return self.prompt_length - self.shared + block * self.block_length

    def block_start(self, block: int) -> int:
        """First position of a block, relative to the generation region."""
        return max(0, block * self.block_length - self.shared)

    def block_stop(self, block: int) -> int:
        """One past its last position."""
        return min(self.gen_length, (block + 1) * self.block_length - self.shared)

    def block_size(self, block: int) -> int:
        """Positions of one block."""
        return self.block_stop(block) - self.block_start(block)


@dataclass(eq=False)
class Canvas:
    """Tokens of one generation and what is still masked.

    Attributes:
        layout: where things are.
        tokens: int64 [length]; masked positions hold the model's mask token, or a draft if it has none.
        masked: bool [gen_length], what is not settled, relative to the generation region. A mask token in the prompt is
            just a token.
    """

    layout: Layout
    tokens: Tensor
    masked: Tensor = field(repr=False)

    @classmethod
    def blank(
        cls,
        prompt: list[int],
        text_length: int,
        mask_id: int | None,
        block_length: int | None = None,
        suffix: list[int] | None = None,
        pattern: AttentionPattern = BIDIRECTIONAL,
        max_length: int | None = None,
    ) -> "Canvas":
        """A canvas whose whole generation region is masked.

        Args:
            text_length: longest text; the region may be longer (see `AttentionPattern.region_length`).
            mask_id: None for a model without a mask token: what its blocks begin with is drawn when their turn comes.
            block_length: None is full diffusion; with a causal model, that model's blocks.
            max_length: longest canvas; where whole blocks do not fit, the last one ends here.
        """
        suffix = suffix or []
        given = len(prompt) + len(suffix)
        if text_length < 1:
            raise ValueError(f"gen_length must be at least 1, got {text_length}")
        gen_length = pattern.region_length(len(prompt), text_length, block_length)
        if max_length is not None:
            gen_length = max(text_length, min(gen_length, max_length - given))
        pattern = pattern.with_blocks(block_length)
        length = block_length or pattern.causal_block or pattern.drafted or gen_length
        if not pattern.causal:
            length = min(length, gen_length)
        layout = Layout(len(prompt), gen_length, length, len(suffix), pattern, cut=gen_length - text_length)
        filler = 0 if mask_id is None else mask_id
        tokens = torch.tensor([*prompt, *[filler] * gen_length, *suffix], dtype=torch.int64)
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
