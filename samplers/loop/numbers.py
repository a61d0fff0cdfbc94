"""The integers of a row, one column each of a batch's table."""

from enum import IntEnum

NEVER = 1 << 40
"""A position that no canvas has: where no end-of-text was committed yet."""


class N(IntEnum):
    """Columns: first what steps change, then what never changes.

    START and STOP bound the active block; CLOSED is what a revising rule has finished; FIRST: the block's first
    position is masked; ENTERED: the block that counters belong to. MOST is what `post_steps` or `draft_steps` said;
    CONFINED: candidates are of the active block whatever window a rule asks for. SHIFTED and JUDGES are traits of the
    attention pattern; KEEPS: something is cached between forwards; GREEDY: the likeliest tokens are taken; WINDOW: the
    widest window; SPANS_STAY: every forward computes the same.
    """

    FORWARDS = 0
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
    PASSES = 31
    VOCABULARY = 32
    SHIFTED = 33
    JUDGES = 34
    KEEPS = 35
    GREEDY = 36
    WINDOW = 37
    SPANS_STAY = 38


CONTEXT = 5
"""Columns of which a rule is told, and that steps change."""
CHANGING = 12
"""Columns that steps change."""
COUNT = len(N)
