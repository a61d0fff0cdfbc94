"""Planning of forwards: positions to compute and positions to read from the cache."""

from copy import deepcopy
from dataclasses import dataclass, field

from samplers.canvas import Layout
from samplers.forward.span import CacheMode, ForwardSpan, KVSlot


@dataclass(eq=False)
class CachePlan:
    """Cached parts of one canvas.

    Attributes:
        mode: cache mode of the generation.
        final: length of the prefix whose keys and values can no longer change; causal models only.
        known: length of the prefix with any keys and values in memory.
    """

    mode: CacheMode = CacheMode.NONE
    memory: KVSlot = field(default_factory=KVSlot)
    final: int = 0
    known: int = 0

    def span(self, layout: Layout, block: int, block_step: int, opens: bool, first_open: bool) -> ForwardSpan:
        """Span of the next forward of a generation.

        Args:
            block, block_step: index of the active block, and number of forwards spent on it.
            opens: True if this forward decides only the block's first position, from the output at the position before
                it.
            first_open: True if that position is still masked and is decided by the output at the position before it.
        """
        start = layout.prompt_length + layout.block_start(block)
        stop = layout.prompt_length + layout.block_stop(block)
        if layout.pattern.noise is not None:
            # A memory is always needed: it also holds the model's output for the previous draft.
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
        """An independent copy, content included."""
        return CachePlan(self.mode, KVSlot(deepcopy(self.memory.content)), self.final, self.known)

    def note(self, span: ForwardSpan, layout: Layout, block: int) -> None:
        """Record that this span was computed while `block` was active."""
        size = layout.pattern.causal_block
        if span.draft is not None:
            self.final = span.draft
        if size is not None and span.memory is not None:
            if span.start <= self.final:
                self.final = (layout.prompt_length + layout.block_start(block)) // size * size
            self.known = span.visible or layout.length
