"""Progress of rows: active block, settled prefix, and entry into the next block."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.loop.batch import Batch
from samplers.loop.masks import anywhere, first_of_rows, places, runs, some_of_rows
from samplers.loop.numbers import ENTERING, N
from samplers.randomness import NOISE, uniform

LOOK = 64
"""Positions among which the next mask is looked for at least."""
Filled = list[tuple[int, list[int]]]
"""Positions that became padding: slot, and positions of its generation region."""


def enter(batch: Batch, slots: Tensor) -> Filled:
    """Make the first block with a mask active in these rows, which have no masks left in their current one.

    A revising row stays in its block until the block is closed. A block about which a forward would predict nothing is
    closed here: if a block's first position is decided by the position before it, it is not predicted again, and it may
    be the block's only position. So an unfinished row always has a position to request.

    Returns the positions that became padding after an end-of-text.
    """
    filled: Filled = []
    while len(slots):
        _find(batch, slots)
        if not batch.revising:
            break
        slots = slots[(batch.numbers[slots, N.REVISES] > 0) & ~_has_candidates(batch, slots)]
        if len(slots):
            slots = slots[_has_nothing_to_say(batch, slots)]
        if len(slots):
            filled += close(batch, slots)
    return filled


def _find(batch: Batch, slots: Tensor) -> None:
    """Record the active block and the values derived from it."""
    n = batch.numbers.index_select(0, slots)
    c = n[:, :ENTERING].unbind(1)
    found = _find_masks(batch, slots, c)
    entered = found.block != c[N.ENTERED]
    masks = found.masks
    if batch.causal:  # Programs of such models count the whole block, even where it holds the prompt's end.
        masks = torch.where(c[N.CAUSAL] > 0, c[N.BLOCK_LENGTH], masks)
    torch.where(entered, masks, c[N.BLOCK_MASKS], out=c[N.BLOCK_MASKS])
    c[N.BLOCK_STEP].masked_fill_(entered, 0)
    for column, value in (
        (N.BLOCK, found.block),
        (N.START, found.start),
        (N.STOP, found.stop),
        (N.SETTLED, found.settled),
        (N.ENTERED, found.block),
    ):
        c[column].copy_(value)
    if batch.shifted:
        c[N.FIRST].copy_(found.first == found.start)
    torch.maximum(c[N.TOLD], found.settled.minimum(c[N.TEXT]).minimum(c[N.END] + 1), out=c[N.TOLD])
    batch.numbers.index_copy_(0, slots, n)
    if batch.keeping_state:
        batch.reset_blocks(slots[entered])
    if batch.drafting:
        fresh = entered & (c[N.NOISE] > 0)
        _draw_noise(batch, slots[fresh], found.start[fresh], found.stop[fresh])


class _Found(NamedTuple):
    """Next masks of rows: the first one (the region's end without one), its block, and the block's masks; [rows]."""

    first: Tensor
    settled: Tensor
    block: Tensor
    start: Tensor
    stop: Tensor
    masks: Tensor


def _find_masks(batch: Batch, slots: Tensor, c: Sequence[Tensor]) -> _Found:
    """Find the first block with masks from the settled (for revising rules: closed) prefix on: all of it is committed.

    One look usually covers the next block. It widens only while a block goes on beyond it, so its cost does not depend
    on the region's length.
    """
    low = c[N.SETTLED]
    if batch.revising:
        low = torch.where(c[N.REVISES] > 0, c[N.CLOSED], low)
    width = min(max(LOOK, batch.block_length), batch.region)
    while True:
        position = (low[:, None] + torch.arange(width, device=slots.device)).clamp_(max=batch.region)
        masked = _masks_at(batch, slots, position)
        some, first = first_of_rows(masked)
        first = settled = torch.where(some, low + first, c[N.GEN])
        if batch.revising:
            settled = torch.where(c[N.REVISES] > 0, first.minimum(c[N.CLOSED]), first)
        block = ((settled + c[N.SHARED]) // c[N.BLOCK_LENGTH]).minimum(c[N.BLOCKS] - 1)
        start = block * c[N.BLOCK_LENGTH] - c[N.SHARED]
        stop = (start + c[N.BLOCK_LENGTH]).minimum(c[N.GEN])
        if not anywhere(stop > low + width):
            masks = (masked & (position < stop[:, None])).sum(dim=1)
            return _Found(first, settled, block, start.clamp(min=0), stop, masks)
        width *= 4


def _masks_between(batch: Batch, slots: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
    """Region positions from `start` [rows], and masks of those before `stop` [rows]; both [rows, width]."""
    width = max(1, int((stop - start).max()))
    position = start[:, None] + torch.arange(width, device=slots.device)
    position.masked_fill_(position >= stop[:, None], batch.region)
    return position, _masks_at(batch, slots, position)


def _masks_at(batch: Batch, slots: Tensor, position: Tensor) -> Tensor:
    """Masks at region positions, bool [rows, width]."""
    place = (slots * batch.masked.shape[1])[:, None] + position
    return batch.masked.view(-1).index_select(0, place.view(-1)).view(position.shape)


def _draw_noise(batch: Batch, slots: Tensor, start: Tensor, stop: Tensor) -> None:
    """Fill the masks of a new block with random tokens, for models without a mask token."""
    if not len(slots):
        return
    n = batch.numbers[slots]
    position, candidate = _masks_between(batch, slots, start, stop)
    row, column = candidate.nonzero(as_tuple=True)
    position = position[row, column]
    numbers = uniform(n[row, N.SEED], n[row, N.STEPS], position, NOISE)
    batch.tokens[slots[row], n[row, N.PROMPT] + position] = (numbers * n[row, N.NOISE]).long()


def _has_candidates(batch: Batch, slots: Tensor) -> Tensor:
    """Rows with a mask in their active block, bool [rows]."""
    n = batch.numbers[slots]
    return some_of_rows(_masks_between(batch, slots, n[:, N.START], n[:, N.STOP])[1])


def _has_nothing_to_say(batch: Batch, slots: Tensor) -> Tensor:
    """Rows without candidates whose next forward would cover no position, bool [rows]."""
    flags = []
    for slot in slots.tolist():
        row = batch.rows[slot]
        assert row is not None
        row.read()
        first, stop = row.asked_bounds()
        flags.append(not row.finished and first >= stop)
    return torch.tensor(flags, dtype=torch.bool, device=slots.device)


def close(batch: Batch, slots: Tensor) -> Filled:
    """Settle the active block of these revising rows. Returns the positions that became padding."""
    n = batch.numbers[slots]
    start, length = n[:, N.CLOSED], n[:, N.STOP] - n[:, N.CLOSED]
    position = runs(start, length)
    row = torch.repeat_interleave(torch.arange(len(slots), device=slots.device), length)
    tokens = batch.tokens[slots[row], n[row, N.PROMPT] + position]
    batch.numbers[slots, N.CLOSED] = n[:, N.STOP]
    return note_ends(batch, slots, row, position, tokens)


def note_ends(
    batch: Batch, slots: Tensor, row: Tensor, position: Tensor, tokens: Tensor, ends: Sequence[int] | None = None
) -> Filled:
    """Record committed end-of-text tokens, and settle masks after them as padding if requested.

    Args:
        row, position, tokens: int64 [n], commits: index into `slots`, region position, token.
        ends: end-of-text tokens, if they are the same in all of these slots.

    Returns the positions that became padding.
    """
    if not batch.ends.shape[1] or not len(tokens) or (ends is not None and not len(ends)):
        return []
    if ends is None:
        is_end = some_of_rows(tokens[:, None] == batch.ends[slots[row]])
    else:
        is_end = reduce(torch.Tensor.logical_or, [tokens == end for end in ends])
    found = places(is_end)
    if not len(found):
        return []
    row, position = row[found], position[found]
    end = batch.numbers[slots, N.END].scatter_reduce(0, row, position, "amin")
    batch.numbers[slots, N.END] = end
    ending = torch.zeros(len(slots), dtype=torch.bool, device=slots.device)
    ending[row] = True
    at = places(ending & (batch.numbers[slots, N.FILL] > 0))
    return _fill(batch, slots[at]) if len(at) else []


def _fill(batch: Batch, slots: Tensor) -> Filled:
    """Settle every mask after these rows' ends as padding."""
    n = batch.numbers[slots]
    position, after = _masks_between(batch, slots, n[:, N.END], n[:, N.GEN])
    row, column = after.nonzero(as_tuple=True)
    position = position[row, column]
    padding = batch.tokens[slots, n[:, N.PROMPT] + n[:, N.END]]
    batch.tokens[slots[row], n[row, N.PROMPT] + position] = padding[row]
    batch.masked[slots[row], position] = False
    counts = after.sum(dim=1).tolist()
    found, first, places = [], 0, position.tolist()
    for slot, count in zip(slots.tolist(), counts, strict=True):
        if count:
            found.append((slot, places[first : first + count]))
        first += count
    return found
