"""Integers of a row, one column each in the table of a batch."""

NEVER = 1 << 40
"""Position beyond every canvas: stands for an end-of-text not yet committed."""


class N:
    """Columns: first those that steps change, then the constant ones. Plain integers: steps use them at every turn.

    STEPS counts forwards of the canvas, one each regardless of its views. START and STOP bound the active block.
    CLOSED: end of the blocks that a revising rule has finished. FIRST: the block's first position is masked. ENTERED:
    the block that counters belong to. MOST: result of `post_steps` or `draft_steps`. CONFINED: candidates are
    restricted to the active block regardless of the rule's window. EVEN: all blocks are of the block length.
    BLANK: the whole region was masked at first.
    """

    STEPS = 0
    BLOCK_STEP = 1
    BLOCK_MASKS = 2
    BLOCK = 3
    START = 4
    STOP = 5
    SETTLED = 6
    ENTERED = 7
    CLOSED = 8
    END = 9
    TOLD = 10
    FIRST = 11
    TEXT = 12
    SHARED = 13
    CAUSAL = 14
    REVISES = 15
    GEN = 16
    BLOCK_LENGTH = 17
    BLOCKS = 18
    NOISE = 19
    LENGTH = 20
    PROMPT = 21
    DENOISED = 22
    STRICT = 23
    SEED = 24
    SLOT = 25
    MASK_ID = 26
    FILL = 27
    DRAFTS = 28
    MOST = 29
    CONFINED = 30
    VOCABULARY = 31
    SHIFTED = 32
    JUDGES = 33
    KEEPS = 34
    GREEDY = 35
    WINDOW = 36
    EVEN = 37
    BLANK = 38
    SPANS_STAY = 39


CONTEXT = 5
"""Number of leading columns that rules can see; steps change them."""
CHANGING = 12
"""Number of leading columns that steps change."""
ENTERING = 20
"""Number of leading columns that determine the active block."""
LAYOUT = slice(N.GEN, N.SLOT + 1)
"""Columns of canvas lengths and of the random stream."""
COUNT = N.SPANS_STAY + 1
