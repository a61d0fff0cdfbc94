"""How a model reads a canvas."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionPattern:
    """How a model reads a canvas.

    Attributes:
        causal_block: length of the blocks, counted from the canvas's first position, of which a later one is never
            seen by an earlier one; within a block all see all. None: everything sees everything.
        fixed: whether that length is the model's alone. If not, it is always that of the blocks denoised together.
        shifted: whether the output at a position is about the next position. The first then stands for itself.
        noise: of a model without a mask token, how many tokens there are: positions that are not settled hold any of
            them at random, and are all drafted anew each step until the whole block is settled. Such a model reads all
            before the block causally, token by token. None: positions that are not settled hold the mask token.
        drafted: length of the blocks of such a model unless somebody says otherwise.
        judges_drawn: whether a drawn token's confidence is its probability after temperature, top-k and top-p, as in
            the family's own program. If not, it is that of the model's unmodified distribution.
        strict: whether the family's own program commits what is surer than a threshold, and not what is just as sure.
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
        """Whether no block sees what comes after it."""
        return self.causal_block is not None or self.noise is not None

    def with_blocks(self, block_length: int | None) -> "AttentionPattern":
        """As it is for canvases of this block length. Raises ValueError if the model cannot have it."""
        if self.causal_block is None:
            return self
        if not self.fixed:
            return replace(self, causal_block=block_length or self.causal_block)
        if block_length is not None and self.causal_block % block_length:
            raise ValueError(f"block_length {block_length} does not divide the model's blocks of {self.causal_block}")
        return self

    def region_length(self, prompt_length: int, text_length: int, block_length: int | None) -> int:
        """Positions to denoise for a text of `text_length` tokens.

        The generation programs of models that write block by block denoise whole blocks and cut the text, and what a
        position becomes depends on all of its block. So the region ends with the block that holds the text's last
        token; in a model that sees everything the region is the text.
        """
        if self.noise is not None:
            size = block_length or self.drafted or text_length
            return -(-text_length // size) * size
        size = self.with_blocks(block_length).causal_block or 1
        return -(-(prompt_length + text_length) // size) * size - prompt_length


BIDIRECTIONAL = AttentionPattern()
