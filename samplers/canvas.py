"""The canvas: prompt, generation region and masks."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from samplers.attention_pattern import BIDIRECTIONAL, AttentionPattern


@dataclass(frozen=True)
class Layout:
    """Lengths and positions of a canvas; fixed for a generation.

    Attributes:
        prompt_length: number of given tokens before the generation region.
        gen_length: number of positions of the generation region.
        suffix_length: number of given tokens after it (infilling).
        block_length: number of positions denoised together. Blocks go left to right; `gen_length` is full diffusion.
            Blocks are counted from the start of the generation region, in block-causal models from the start of the
            canvas: the first block then holds the end of the prompt.
        pattern: attention pattern of the model.
        cut: number of positions at the region's end that are denoised with their block but do not belong to the text.
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
        """An equal layout to hand to samplers, made once: changes to it do not affect this one."""
        return replace(self, pattern=replace(self.pattern))

    @property
    def length(self) -> int:
        """Number of positions of the whole canvas."""
        return self.prompt_length + self.gen_length + self.suffix_length

    @property
    def denoised_length(self) -> int:
        """Number of positions of all blocks, counted as whole: the steps of a schedule of one position per step."""
        return self.gen_length if self.pattern.causal_block is None else self.blocks * self.block_length

    @property
    def text_length(self) -> int:
        """Maximum length of the text, in tokens."""
        return self.gen_length - self.cut

    @property
    def missing(self) -> int:
        """Number of positions by which the last block falls short of a whole one because the context ended."""
        return self.pattern.region_length(self.prompt_length, self.text_length, self.block_length) - self.gen_length

    @property
    def shared(self) -> int:
        """Number of positions of the first block that belong to the prompt."""
        return 0 if self.pattern.causal_block is None else self.prompt_length % self.block_length

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may be shorter."""
        return -(-(self.gen_length + self.shared) // self.block_length)

    def block_place(self, block: int) -> int:
        """First position of a block on the canvas; may lie in the prompt."""
        return self.prompt_length - self.shared + block * self.block_length

    def block_start(self, block: int) -> int:
        """First position of a block, relative to the generation region."""
        return max(0, block * self.block_length - self.shared)

    def block_stop(self, block: int) -> int:
        """End (exclusive) of a block, relative to the generation region."""
        return min(self.gen_length, (block + 1) * self.block_length - self.shared)

    def block_size(self, block: int) -> int:
        """Number of positions of a block."""
        return self.block_stop(block) - self.block_start(block)


@dataclass(eq=False)
class Canvas:
    """Tokens of one generation and the mask of unsettled positions.

    Attributes:
        layout: lengths and positions.
        tokens: int64 [length]; masked positions hold the model's mask token, or a draft for models without one.
        masked: bool [gen_length], unsettled positions, relative to the generation region. A mask token in the prompt
            counts as an ordinary token.
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
        """A canvas with a fully masked generation region.

        Args:
            text_length: maximum length of the text; the region may be longer (see `AttentionPattern.region_length`).
            mask_id: None for a model without a mask token: the initial content of its blocks is drawn as they become
                active.
            block_length: None is full diffusion; with a causal model, that model's blocks.
            max_length: maximum length of the canvas; a last block that does not fit ends there.
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
        """Length of the committed prefix of the generation region, which can no longer change."""
        return int(self.masked.int().argmax()) if bool(self.masked.any()) else self.layout.gen_length
