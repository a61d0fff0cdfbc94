"""Progress of rows after a step: ends of text, settled prefixes, counters, and the next block."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from samplers.loop.masks import anywhere, first_of_rows, places, some_of_rows
from samplers.loop.numbers import CHANGING, NEVER, N
from samplers.loop.opened import Opened
from samplers.loop.part import Part
from samplers.loop.telling import Changes
from samplers.loop.window import Filled, close, enter, note_ends


def note_part_ends(part: Part, opened: Opened, changes: Changes, done: Tensor | None, left: Tensor) -> Filled:
    """Record end-of-text tokens that were committed for good. Returns the positions that became padding."""
    batch, slots, token = part.batch, part.slots, changes.token
    if not part.revising:
        return note_ends(batch, slots, changes.row, changes.position, token, part.ends)
    assert done is not None
    plain = opened.numbers[:, N.REVISES] == 0
    kept = plain[changes.row]
    filled = note_ends(batch, slots, changes.row[kept], changes.position[kept], token[kept])
    finished = ~plain & done & ~some_of_rows(left & opened.block)
    if anywhere(finished):
        filled += close(batch, slots[finished])
    return filled


def settle(part: Part, opened: Opened, left: Tensor, filled: Filled, failed: Collection[int]) -> Tensor:
    """Count the forward, record settled positions, and enter the next block.

    Adds new padding to `filled`.

    Args:
        left: bool [rows, width], remaining masks.
        failed: rows that stop and keep their state.

    Returns:
        The rows' integers, [rows, CHANGING].
    """
    batch, slots = part.batch, part.slots
    # Ends and closed blocks were noted in the batch.
    n = batch.numbers.index_select(0, slots)[:, :CHANGING]
    c = n.unbind(1)
    some, first = first_of_rows(left & opened.block if part.region else left)
    if not part.zero_based:
        first = first + c[N.START]
    c[N.STEPS].add_(1)
    c[N.BLOCK_STEP].add_(1)
    # A block without a mask is settled to its end; at the region's end, there is no further block to enter.
    settled = torch.where(some, first, c[N.STOP])
    moved = ~some
    if part.revising:
        revises = part.static[:, N.REVISES] > 0
        settled = torch.where(some, first, torch.where(revises, c[N.SETTLED], c[N.STOP]))
        settled = torch.where(revises, settled.minimum(c[N.CLOSED]), settled)
        moved &= revises | (c[N.STOP] < part.gen)
    else:
        moved &= c[N.STOP] < part.gen
    c[N.SETTLED].copy_(settled)
    if part.shifted:
        c[N.FIRST].copy_(some & (first == c[N.START]))
    torch.maximum(c[N.TOLD], settled.minimum(part.text).minimum(c[N.END] + 1), out=c[N.TOLD])
    if failed:  # they stay as they were
        gone = list(failed)
        n[gone], moved[gone] = opened.numbers[gone, :CHANGING], False
    if part.blank and anywhere(moved):
        following = moved & (c[N.END] == NEVER)
        _follow(part, c, following)
        moved ^= following
    batch.numbers[:, :CHANGING].index_copy_(0, slots, n)
    if filled:
        at = {row.slot: i for i, row in enumerate(part.rows)}
        moved[torch.tensor([at[slot] for slot, _ in filled], device=moved.device)] = True
    moving = places(moved)
    if not len(moving):
        return n
    filled += enter(batch, slots.index_select(0, moving))
    return batch.numbers[:, :CHANGING].index_select(0, slots)


def _follow(part: Part, c: Sequence[Tensor], moved: Tensor) -> None:
    """Let rows of whole masked regions, bool [rows], enter their next block: nothing in it can be committed already.

    Args:
        c: the changing integers of all rows, each [rows].
    """
    start = c[N.STOP].clone()
    stop = torch.where(moved, (start + part.block_length).minimum(part.gen), start)
    masks = torch.where(part.causal > 0, part.block_length, stop - start) if part.batch.causal else stop - start
    c[N.BLOCK].add_(moved)
    c[N.ENTERED].add_(moved)
    torch.where(moved, start, c[N.START], out=c[N.START])
    torch.where(moved, masks, c[N.BLOCK_MASKS], out=c[N.BLOCK_MASKS])
    c[N.STOP].copy_(stop)
    c[N.BLOCK_STEP].masked_fill_(moved, 0)
    if part.shifted:
        c[N.FIRST].logical_or_(moved)
    if part.batch.keeping_state:
        part.batch.reset_blocks(part.slots[moved])
