"""Which positions of a canvas a forward computes anew, and which it knows from an earlier one."""

from copy import deepcopy
from dataclasses import dataclass, field

from samplers.canvas import Layout
from samplers.forward.span import CacheMode, ForwardSpan, KVSlot


@dataclass(eq=False)
class CachePlan:
    """What is known of one canvas from its forwards so far.

    Attributes:
        mode: what is kept.
        final: positions from the canvas's start whose keys and values can no longer change; causal models only.
        known: positions from its start of which there are any in memory.
    """

    mode: CacheMode = CacheMode.NONE
    memory: KVSlot = field(default_factory=KVSlot)
    final: int = 0
    known: int = 0

    def span(self, layout: Layout, block: int, block_step: int, opens: bool, first_open: bool) -> ForwardSpan:
        """What the next forward of a generation spans.

        Args:
            block, block_step: the active block, and forwards spent on it.
            opens: whether this forward is about the block's first position only, which the one before it decides.
            first_open: whether that position is still masked, and is decided by the one before it.
        """
        start = layout.prompt_length + layout.block_start(block)
        stop = layout.prompt_length + layout.block_stop(block)
        if layout.pattern.noise is not None:
            # Always with a memory: it also holds what the model said of the draft before.
            first = 0 if self.mode is CacheMode.NONE else self.final
            return ForwardSpan(first, stop, self.memory, stop, draft=start)
        if layout.pattern.causal_block is None:
            if self.mode is CacheMode.NONE:
                return ForwardSpan(0, layout.length)
            if block_step == 0:
                return ForwardSpan(0, layout.length, self.memory)
            return ForwardSpan(start, stop if self.mode is CacheMode.DUAL else layout.length, self.memory)
        size = layout.pattern.causal_block
        first = start // size * size
        visible = first if opens else min(first + size, layout.length)
        if self.mode is CacheMode.NONE:
            return ForwardSpan(0, visible, None, visible, size)
        if self.mode is CacheMode.DUAL and block_step and self.known >= visible and not first_open:
            return ForwardSpan(layout.block_place(block), stop, self.memory, visible, size)
        return ForwardSpan(self.final, visible, self.memory, visible, size)

    def forked(self) -> "CachePlan":
        """A copy that can be changed apart, content included."""
        return CachePlan(self.mode, KVSlot(deepcopy(self.memory.content)), self.final, self.known)

    def note(self, span: ForwardSpan, layout: Layout, block: int) -> None:
        """That this feed was computed, `block` being the active one."""
        size = layout.pattern.causal_block
        if span.draft is not None:
            self.final = span.draft
        if size is not None and span.memory is not None:
            if span.start <= self.final:
                self.final = (layout.prompt_length + layout.block_start(block)) // size * size
            self.known = span.visible or layout.length
