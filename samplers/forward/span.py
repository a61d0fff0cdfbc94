"""Positions that a forward computes of a canvas, and the place of its keys and values."""

from dataclasses import dataclass
from enum import StrEnum


class CacheMode(StrEnum):
    """Keys and values kept from a generation's last full forward, one at the start of every block.

    `none`: every forward is a full one, exact. The others approximate: the keys and values of some positions are those
    of the block's first forward (Fast-dLLM, arXiv 2505.22618, section 3.2). `prefix`: of all positions before the
    block. `dual`: of all positions outside the block.

    In block-causal models, positions never see later blocks, so `prefix` is exact: finished blocks are computed once.
    `dual` is the same if the model's blocks are those denoised together; if they are longer, it also keeps the rest of
    the model's block (Fast-dLLM v2, arXiv 2509.26328, section 3.3), which approximates. In models whose outputs predict
    the next position, forwards of a block are wide until its first position is committed.
    """

    NONE = "none"
    PREFIX = "prefix"
    DUAL = "dual"


@dataclass(eq=False)
class KVSlot:
    """Place for the keys and values of one canvas, held by a backend; freed with its generation."""

    content: object | None = None


@dataclass(frozen=True)
class ForwardSpan:
    """Positions `start` to `stop` (exclusive) of one canvas, to be computed by a forward.

    A forward over all visible positions stores its keys and values in `memory`, if given. Any other forward reads them
    and overwrites those of its span.

    Attributes:
        visible: length of the part of the canvas that attention reads; None is all of it.
        causal_block: as in `AttentionPattern`.
        draft: start of the block that a model without a mask token drafts. Positions before it are settled and read
            causally.
    """

    start: int
    stop: int
    memory: KVSlot | None = None
    visible: int | None = None
    causal_block: int | None = None
    draft: int | None = None
