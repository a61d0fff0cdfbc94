"""Which positions of a canvas a forward computes anew, and which it knows from an earlier one."""

from dataclasses import dataclass
from enum import StrEnum

from samplers.canvas import Layout


class CacheMode(StrEnum):
    """What a generation keeps of its last full forward, one at the start of every block.

    `none`: every forward is a full one, exact. The others approximate: the keys and values of some positions are those
    of the block's first forward (Fast-dLLM, arXiv 2505.22618, section 3.2). `prefix`: of all before the block. `dual`:
    of all but the block.
    """

    NONE = "none"
    PREFIX = "prefix"
    DUAL = "dual"


@dataclass(eq=False)
class Memory:
    """A place for what a backend keeps of one canvas; it goes when the generation goes."""

    content: object | None = None


@dataclass(frozen=True)
class Feed:
    """What a forward computes of one canvas: positions `start` to `stop`.

    A forward over the whole canvas leaves its keys and values in `memory`, if there is one; any other reads them.
    """

    start: int
    stop: int
    memory: Memory | None = None


def feed(mode: CacheMode, memory: Memory, layout: Layout, block: int, block_step: int) -> Feed:
    """What the next forward of a generation feeds, on the `block_step`-th step of a block."""
    if mode is CacheMode.NONE:
        return Feed(0, layout.length)
    if block_step == 0:
        return Feed(0, layout.length, memory)
    start = layout.prompt_length + block * layout.block_length
    return Feed(start, start + layout.block_size(block) if mode is CacheMode.DUAL else layout.length, memory)
