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
    BLOCK = 1
    BLOCK_STEP = 2
    BLOCK_MASKS = 3
    START = 4
    STOP = 5
    SETTLED = 6
    CLOSED = 7
    END = 8
    TOLD = 9
    ENTERED = 10
    FIRST = 11
    SEED = 12
    SLOT = 13
    LENGTH = 14
    PROMPT = 15
    GEN = 16
    TEXT = 17
    BLOCK_LENGTH = 18
    SHARED = 19
    BLOCKS = 20
    DENOISED = 21
    CAUSAL = 22
    NOISE = 23
    STRICT = 24
    MASK_ID = 25
    FILL = 26
    REVISES = 27
    DRAFTS = 28
    MOST = 29
    CONFINED = 30
    VOCABULARY = 31


CHANGING = 12
"""Columns that steps change."""
COUNT = len(N)
