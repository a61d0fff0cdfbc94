"""The integers of a row, one column each of a batch's table."""

from enum import IntEnum

NEVER = 1 << 40
"""A position that no canvas has: where no end-of-text was committed yet."""


class N(IntEnum):
    """Columns: first what steps change, then what never changes.

    STEPS counts forwards of the canvas, one each whatever number of views it has. START and STOP bound the active
    block; CLOSED is what a revising rule has finished; FIRST: the block's first position is masked; ENTERED: the block
    that counters belong to. MOST is what `post_steps` or `draft_steps` said; CONFINED: candidates are of the active
    block whatever window a rule asks for.
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
    GEN = 12
    TEXT = 13
    BLOCK_LENGTH = 14
    SHARED = 15
    BLOCKS = 16
    CAUSAL = 17
    NOISE = 18
    REVISES = 19
    SEED = 20
    SLOT = 21
    LENGTH = 22
    PROMPT = 23
    DENOISED = 24
    STRICT = 25
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
    SPANS_STAY = 37


CONTEXT = 5
"""Columns of which a rule is told, and that steps change."""
CHANGING = 12
"""Columns that steps change."""
ENTERING = 20
"""Columns that decide which block is the active one."""
COUNT = len(N)
