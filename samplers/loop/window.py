"""Where rows are: their active block, what is settled before it, and when it is time for the next."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from samplers.loop.batch import Batch
from samplers.loop.masks import anywhere, first_of_rows, places, runs, some_of_rows
from samplers.loop.numbers import ENTERING, N
from samplers.randomness import NOISE, uniform

LOOK = 64
"""Positions among which the next mask is looked for first."""
Filled = list[tuple[int, list[int]]]
"""What became padding: slot, and positions of its generation region."""


def enter(batch: Batch, slots: Tensor) -> Filled:
    """Make the first block with a mask the active one of these rows, which have none left in theirs.

    A row that revises stays in its block until that is closed. A block of which a forward would say nothing is closed
    here: where a block's first position is decided by the position before it, it is not told again, and a block may
    hold no other. So no row that is not finished is ever asked about nothing.

    Returns what became padding after an end-of-text.
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
    """Note the active block, and what follows from it."""
    n = batch.numbers.index_select(0, slots)
    c = n[:, :ENTERING].unbind(1)
    settled = _first_mask(batch, slots, c)
    if batch.revising:
        settled = torch.where(c[N.REVISES] > 0, settled.minimum(c[N.CLOSED]), settled)
    block = ((settled + c[N.SHARED]) // c[N.BLOCK_LENGTH]).minimum(c[N.BLOCKS] - 1)
    first = block * c[N.BLOCK_LENGTH] - c[N.SHARED]
    start, stop = first.clamp(min=0), (first + c[N.BLOCK_LENGTH]).minimum(c[N.GEN])
    position, candidate = _masks_between(batch, slots, start, stop)
    entered = block != c[N.ENTERED]
    masks = candidate.sum(dim=1)
    if batch.causal:  # The programs of such models count the whole block, also where it holds the prompt's end.
        masks = torch.where(c[N.CAUSAL] > 0, c[N.BLOCK_LENGTH], masks)
    torch.where(entered, masks, c[N.BLOCK_MASKS], out=c[N.BLOCK_MASKS])
    c[N.BLOCK_STEP].masked_fill_(entered, 0)
    n[:, N.BLOCK : N.ENTERED + 1] = torch.stack([block, start, stop, settled, block], dim=1)
    if batch.shifted:
        c[N.FIRST].copy_(candidate[:, 0])
    c[N.TOLD].copy_(c[N.TOLD].maximum(settled.minimum(c[N.TEXT]).minimum(c[N.END] + 1)))
    batch.numbers.index_copy_(0, slots, n)
    if batch.keeping_state:
        batch.reset_blocks(slots[entered])
    if batch.drafting:
        fresh = entered & (c[N.NOISE] > 0)
        _draw_noise(batch, slots[fresh], position[fresh], candidate[fresh])


def _first_mask(batch: Batch, slots: Tensor, c: Sequence[Tensor]) -> Tensor:
    """First masked position of each row, the region's end where there is none; int64 [rows].

    Everything before what is settled, or closed, is known to be committed. The next block is looked at first, and more
    at a time where that is full, so that a long region costs no more than a short one.
    """
    low = c[N.SETTLED]
    if batch.revising:
        low = torch.where(c[N.REVISES] > 0, c[N.CLOSED], low)
    found, width = c[N.GEN], LOOK
    while True:
        _, masked = _masks_between(batch, slots, low, (low + width).minimum(c[N.GEN]), width)
        some, first = first_of_rows(masked)
        found = torch.where(some & (found == c[N.GEN]), low + first, found)
        low = low + width
        if not anywhere((found == c[N.GEN]) & (low < c[N.GEN])):
            return found
        width *= 4


def _masks_between(
    batch: Batch, slots: Tensor, start: Tensor, stop: Tensor, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Region positions from `start` [rows] on, and which of those before `stop` [rows] are masked; [rows, width]."""
    width = width or max(1, int((stop - start).max()))
    position = start[:, None] + torch.arange(width, device=slots.device)
    position.masked_fill_(position >= stop[:, None], batch.region)
    place = slots[:, None] * batch.masked.shape[1] + position
    return position, batch.masked.view(-1).index_select(0, place.view(-1)).view(position.shape)


def _draw_noise(batch: Batch, slots: Tensor, position: Tensor, candidate: Tensor) -> None:
    """What the candidates of a new block hold where there is no mask token."""
    n = batch.numbers[slots]
    row, column = candidate.nonzero(as_tuple=True)
    position = position[row, column]
    numbers = uniform(n[row, N.SEED], n[row, N.STEPS], position, NOISE)
    batch.tokens[slots[row], n[row, N.PROMPT] + position] = (numbers * n[row, N.NOISE]).long()


def _has_candidates(batch: Batch, slots: Tensor) -> Tensor:
    """Rows with a mask in their active block, bool [rows]."""
    n = batch.numbers[slots]
    return some_of_rows(_masks_between(batch, slots, n[:, N.START], n[:, N.STOP])[1])


def _has_nothing_to_say(batch: Batch, slots: Tensor) -> Tensor:
    """Rows without candidates whose next forward would be about no position at all, bool [rows]."""
    flags = []
    for slot in slots.tolist():
        row = batch.rows[slot]
        assert row is not None
        row.read()
        first, stop = row.asked_bounds()
        flags.append(not row.finished and first >= stop)
    return torch.tensor(flags, dtype=torch.bool, device=slots.device)


def close(batch: Batch, slots: Tensor) -> Filled:
    """Settle what the active block of these rows, which revise, holds; returns what became padding."""
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
    """Note committed end-of-text tokens, and settle masks after them as padding where that is wanted.

    Args:
        row, position, tokens: int64 [n], what was committed: index into `slots`, region position, token.
        ends: end-of-text tokens where they are the same in all of these slots.

    Returns what became padding.
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
