"""What a forward computes of a canvas, and where its keys and values are kept."""

from dataclasses import dataclass
from enum import StrEnum


class CacheMode(StrEnum):
    """What a generation keeps of its last full forward, one at the start of every block.

    `none`: every forward is a full one, exact. The others approximate: the keys and values of some positions are those
    of the block's first forward (Fast-dLLM, arXiv 2505.22618, section 3.2). `prefix`: of all before the block. `dual`:
    of all but the block.

    A block-causal model never sees what comes later, so that `prefix` is exact: finished blocks are computed once.
    `dual` is the same where its blocks are those denoised together; where they are longer, it keeps the rest of the
    model's block too (Fast-dLLM v2, arXiv 2509.26328, section 3.3), which approximates. In a model whose outputs are
    about the next position, a block's forwards are wide ones until its first position is committed.
    """

    NONE = "none"
    PREFIX = "prefix"
    DUAL = "dual"


@dataclass(eq=False)
class KVSlot:
    """A place for what a backend keeps of one canvas; it goes when the generation goes."""

    content: object | None = None


@dataclass(frozen=True)
class ForwardSpan:
    """What a forward computes of one canvas: positions `start` to `stop`.

    A forward over all that is visible leaves its keys and values in `memory`, if there is one; any other reads them,
    and puts those of what it spans in their place.

    Attributes:
        visible: length of the part of the canvas that attention reads; None is all of it.
        causal_block: as in `AttentionPattern`.
        draft: position at which the block begins that a model without a mask token drafts. What is fed before it is
            settled, and read causally.
    """

    start: int
    stop: int
    memory: KVSlot | None = None
    visible: int | None = None
    causal_block: int | None = None
    draft: int | None = None
