"""Attention patterns of models over a canvas."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionPattern:
    """Attention of a model over a canvas, and the traits of its family that depend on it.

    Attributes:
        causal_block: block length of block-causal attention, counted from the start of the canvas: positions see their
            own block and all earlier ones. None: bidirectional attention.
        fixed: True if the model fixes that length. Otherwise it follows the blocks denoised together.
        shifted: True if the output at a position predicts the next position. The first position then predicts itself.
        noise: number of tokens to draw noise from, for a model without a mask token: unsettled positions hold random
            tokens, and all are drafted anew each step until the whole block is settled. Such a model reads everything
            before the block causally, token by token. None: unsettled positions hold the mask token.
        drafted: default block length of a model without a mask token.
        judges_drawn: True if the confidence of a drawn token is its probability after temperature, top-k and top-p, as
            in the family's own program. Otherwise it is the probability in the model's unmodified distribution.
        strict: True if the family's own program requires a confidence above the threshold, not equal to it.
    """

    causal_block: int | None = None
    fixed: bool = False
    shifted: bool = False
    noise: int | None = None
    drafted: int | None = None
    judges_drawn: bool = False
    strict: bool = False

    @property
    def causal(self) -> bool:
        """True if no block sees later blocks."""
        return self.causal_block is not None or self.noise is not None

    def with_blocks(self, block_length: int | None) -> "AttentionPattern":
        """The pattern for canvases of this block length. Raises ValueError if the model does not support it."""
        if self.causal_block is None:
            return self
        if not self.fixed:
            return replace(self, causal_block=block_length or self.causal_block)
        if block_length is not None and self.causal_block % block_length:
            raise ValueError(f"block_length {block_length} does not divide the model's blocks of {self.causal_block}")
        return self

    def region_length(self, prompt_length: int, text_length: int, block_length: int | None) -> int:
        """Number of positions to denoise for a text of `text_length` tokens.

        Generation programs of block-causal models denoise whole blocks and cut the text, and each position depends on
        all of its block. The region therefore ends with the block of the text's last token. For bidirectional models
        the region is the text.
        """
        if self.noise is not None:
            size = block_length or self.drafted or text_length
            return -(-text_length // size) * size
        size = self.with_blocks(block_length).causal_block or 1
        return -(-(prompt_length + text_length) // size) * size - prompt_length


BIDIRECTIONAL = AttentionPattern()
