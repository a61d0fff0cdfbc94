"""Where rows are: their active block, what is settled before it, and when it is time for the next."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.loop.batch import Batch
from samplers.loop.numbers import N
from samplers.randomness import NOISE, uniform


def enter(batch: Batch, slots: Tensor) -> list[tuple[int, list[int]]]:
    """Make the first block with a mask the active one of these rows, which have none left in theirs.

    A row that revises stays in its block until that is closed. A block of which a forward would say nothing is closed
    here: where a block's first position is decided by the position before it, it is not told again, and a block may
    hold no other. So no row that is not finished is ever asked about nothing.

    Returns:
        what became padding after an end-of-text: slot, and positions of its generation region.
    """
    filled: list[tuple[int, list[int]]] = []
    while len(slots):
        some = _find(batch, slots)
        slots = slots[~some & (batch.numbers[slots, N.REVISES] > 0)]
        if len(slots):
            slots = slots[_has_nothing_to_say(batch, slots)]
        if len(slots):
            filled += close(batch, slots)
    return filled


def _find(batch: Batch, slots: Tensor) -> Tensor:
    """Note the active block, and what follows from it; returns which of them have candidates, bool [rows]."""
    n = batch.numbers.index_select(0, slots)
    c = n.unbind(1)
    masked = batch.masked.index_select(0, slots)
    some = masked.any(dim=1)
    settled = torch.where(some, masked.byte().argmax(dim=1), c[N.GEN])
    settled = torch.where(c[N.REVISES] > 0, settled.minimum(c[N.CLOSED]), settled)
    block = ((settled + c[N.SHARED]) // c[N.BLOCK_LENGTH]).minimum(c[N.BLOCKS] - 1)
    first = block * c[N.BLOCK_LENGTH] - c[N.SHARED]
    start, stop = first.clamp(min=0), (first + c[N.BLOCK_LENGTH]).minimum(c[N.GEN])
    place = batch.places
    candidate = masked & (place >= start[:, None]) & (place < stop[:, None])
    entered = block != c[N.ENTERED]
    # The programs of block-causal models count the whole block, also where it holds the prompt's end.
    masks = torch.where(c[N.CAUSAL] > 0, c[N.BLOCK_LENGTH], candidate.sum(dim=1))
    c[N.BLOCK_MASKS].copy_(torch.where(entered, masks, c[N.BLOCK_MASKS]))
    c[N.BLOCK_STEP].masked_fill_(entered, 0)
    for which, value in ((N.SETTLED, settled), (N.BLOCK, block), (N.START, start), (N.STOP, stop), (N.ENTERED, block)):
        c[which].copy_(value)
    c[N.FIRST].copy_(candidate.gather(1, start[:, None])[:, 0])
    c[N.TOLD].copy_(c[N.TOLD].maximum(told_stop(c)))
    batch.numbers.index_copy_(0, slots, n)
    if bool(entered.any()):
        batch.reset_blocks(slots[entered])
        fresh = entered & (c[N.NOISE] > 0)
        if bool(fresh.any()):
            _draw_noise(batch, slots[fresh], candidate[fresh])
    return candidate.any(dim=1)


def _draw_noise(batch: Batch, slots: Tensor, candidate: Tensor) -> None:
    """What the candidates of a new block hold where there is no mask token."""
    n = batch.numbers[slots]
    row, position = candidate.nonzero(as_tuple=True)
    numbers = uniform(n[row, N.SEED], n[row, N.STEPS], position, NOISE)
    batch.tokens[slots[row], n[row, N.PROMPT] + position] = (numbers * n[row, N.NOISE]).long()


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


def close(batch: Batch, slots: Tensor) -> list[tuple[int, list[int]]]:
    """Settle what the active block of these rows, which revise, holds; returns what became padding."""
    n = batch.numbers[slots]
    place = torch.arange(batch.region, device=slots.device)
    inside = (place >= n[:, N.CLOSED, None]) & (place < n[:, N.STOP, None])
    row, position = inside.nonzero(as_tuple=True)
    tokens = batch.tokens[slots[row], n[row, N.PROMPT] + position]
    batch.numbers[slots, N.CLOSED] = n[:, N.STOP]
    return note_ends(batch, slots, row, position, tokens)


def note_ends(
    batch: Batch, slots: Tensor, row: Tensor, position: Tensor, tokens: Tensor
) -> list[tuple[int, list[int]]]:
    """Note committed end-of-text tokens, and settle masks after them as padding where that is wanted.

    Args:
        row, position, tokens: int64 [n], what was committed: index into `slots`, region position, token.

    Returns:
        what became padding.
    """
    if not batch.ends.shape[1] or not len(tokens):
        return []
    is_end = (tokens[:, None] == batch.ends[slots[row]]).any(dim=1)
    if not bool(is_end.any()):
        return []
    end = batch.numbers[slots, N.END].scatter_reduce(0, row[is_end], position[is_end], "amin")
    batch.numbers[slots, N.END] = end
    at = row[is_end].unique()
    at = at[(batch.numbers[slots[at], N.FILL] > 0)]
    return _fill(batch, slots[at]) if len(at) else []


def _fill(batch: Batch, slots: Tensor) -> list[tuple[int, list[int]]]:
    """Settle every mask after these rows' ends as padding."""
    n = batch.numbers[slots]
    end = n[:, N.END, None]
    after = batch.masked[slots] & (torch.arange(batch.region + 1, device=slots.device) >= end)
    row, position = after.nonzero(as_tuple=True)
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


def told_stop(c: Sequence[Tensor]) -> Tensor:
    """End of the settled text of each row, end-of-text included; [rows], of the table's columns."""
    return c[N.SETTLED].minimum(c[N.TEXT]).minimum(c[N.END] + 1)
