"""Which positions of a canvas a forward computes anew, and which it knows from an earlier one."""

from dataclasses import dataclass, field
from enum import StrEnum

from samplers.canvas import Layout


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
class Memory:
    """A place for what a backend keeps of one canvas; it goes when the generation goes."""

    content: object | None = None


@dataclass(frozen=True)
class Feed:
    """What a forward computes of one canvas: positions `start` to `stop`.

    A forward over all that is visible leaves its keys and values in `memory`, if there is one; any other reads them,
    and puts those of what it feeds in their place.

    Attributes:
        visible: length of the part of the canvas that attention reads; None is all of it.
        causal_block: as in `Scheme`.
        draft: position at which the block begins that a model without a mask token drafts. What is fed before it is
            settled, and read causally.
    """

    start: int
    stop: int
    memory: Memory | None = None
    visible: int | None = None
    causal_block: int | None = None
    draft: int | None = None


@dataclass(eq=False)
class Cache:
    """What is known of one canvas from its forwards so far.

    Attributes:
        mode: what is kept.
        final: positions from the canvas's start whose keys and values can no longer change; causal models only.
        known: positions from its start of which there are any in memory.
    """

    mode: CacheMode = CacheMode.NONE
    memory: Memory = field(default_factory=Memory)
    final: int = 0
    known: int = 0

    def feed(self, layout: Layout, block: int, block_step: int, opens: bool, first_open: bool) -> Feed:
        """What the next forward of a generation feeds.

        Args:
            block, block_step: the active block, and forwards spent on it.
            opens: whether this forward is about the block's first position only, which the one before it decides.
            first_open: whether that position is still masked, and is decided by the one before it.
        """
        start = layout.prompt_length + layout.block_start(block)
        stop = layout.prompt_length + layout.block_stop(block)
        if layout.scheme.noise is not None:
            # Always with a memory: it also holds what the model said of the draft before.
            first = 0 if self.mode is CacheMode.NONE else self.final
            return Feed(first, stop, self.memory, stop, draft=start)
        if layout.scheme.causal_block is None:
            if self.mode is CacheMode.NONE:
                return Feed(0, layout.length)
            if block_step == 0:
                return Feed(0, layout.length, self.memory)
            return Feed(start, stop if self.mode is CacheMode.DUAL else layout.length, self.memory)
        size = layout.scheme.causal_block
        first = start // size * size
        visible = first if opens else min(first + size, layout.length)
        if self.mode is CacheMode.NONE:
            return Feed(0, visible, None, visible, size)
        if self.mode is CacheMode.DUAL and block_step and self.known >= visible and not first_open:
            return Feed(layout.block_place(block), stop, self.memory, visible, size)
        return Feed(self.final, visible, self.memory, visible, size)

    def note(self, fed: Feed, layout: Layout, block: int) -> None:
        """That this feed was computed, `block` being the active one."""
        size = layout.scheme.causal_block
        if fed.draft is not None:
            self.final = fed.draft
        if size is not None and fed.memory is not None:
            if fed.start <= self.final:
                self.final = (layout.prompt_length + layout.block_start(block)) // size * size
            self.known = fed.visible or layout.length
