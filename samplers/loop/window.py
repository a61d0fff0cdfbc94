"""Where rows are: their active block, what is settled before it, and when it is time for the next."""

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
    n = batch.numbers[slots]
    masked = batch.masked[slots]
    some = masked.any(dim=1)
    settled = torch.where(some, masked.byte().argmax(dim=1), n[:, N.GEN])
    n[:, N.SETTLED] = torch.where(n[:, N.REVISES] > 0, settled.minimum(n[:, N.CLOSED]), settled)
    block = block_of(n, n[:, N.SETTLED])
    start, stop = block_bounds(n, block)
    place = torch.arange(masked.shape[1], device=masked.device)
    candidate = masked & (place >= start[:, None]) & (place < stop[:, None])
    entered = block != n[:, N.ENTERED]
    n[:, N.BLOCK], n[:, N.START], n[:, N.STOP], n[:, N.ENTERED] = block, start, stop, block
    n[:, N.BLOCK_STEP] = n[:, N.BLOCK_STEP].masked_fill(entered, 0)
    # The programs of block-causal models count the whole block, also where it holds the prompt's end.
    masks = torch.where(n[:, N.CAUSAL] > 0, n[:, N.BLOCK_LENGTH], candidate.sum(dim=1))
    n[:, N.BLOCK_MASKS] = torch.where(entered, masks, n[:, N.BLOCK_MASKS])
    n[:, N.FIRST] = candidate.gather(1, start[:, None])[:, 0].long()
    n[:, N.TOLD] = n[:, N.TOLD].maximum(told_stop(n))
    batch.numbers[slots] = n
    if bool(entered.any()):
        batch.reset_blocks(slots[entered])
        fresh = entered & (n[:, N.NOISE] > 0)
        if bool(fresh.any()):
            _draw_noise(batch, slots[fresh], candidate[fresh])
    return candidate.any(dim=1)


def _draw_noise(batch: Batch, slots: Tensor, candidate: Tensor) -> None:
    """What the candidates of a new block hold where there is no mask token."""
    n = batch.numbers[slots]
    row, position = candidate.nonzero(as_tuple=True)
    numbers = uniform(n[row, N.SEED], n[row, N.FORWARDS], position, NOISE)
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


def block_of(n: Tensor, position: Tensor) -> Tensor:
    """The block of a region position of each row, the last one at the region's end; [rows]."""
    return ((position + n[:, N.SHARED]) // n[:, N.BLOCK_LENGTH]).minimum(n[:, N.BLOCKS] - 1)


def block_bounds(n: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """First region position of each row's block, and one past its last; [rows]."""
    first = block * n[:, N.BLOCK_LENGTH] - n[:, N.SHARED]
    return first.clamp(min=0), (first + n[:, N.BLOCK_LENGTH]).minimum(n[:, N.GEN])


def told_stop(n: Tensor) -> Tensor:
    """End of the settled text of each row, end-of-text included; [rows]."""
    return n[:, N.SETTLED].minimum(n[:, N.TEXT]).minimum(n[:, N.END] + 1)
