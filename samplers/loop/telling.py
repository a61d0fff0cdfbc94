"""Events from tensors: a single transfer to Python of the changes and progress of each row."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from samplers.contract import SamplerError
from samplers.loop.event import StepEvent
from samplers.loop.masks import counts_of, runs
from samplers.loop.numbers import N
from samplers.loop.opened import Opened
from samplers.loop.part import Part
from samplers.loop.window import Filled


@dataclass
class Changes:
    """Changes of a step to the canvases of a part.

    Attributes:
        commit, replaced, remask: bool [rows, width].
        row, position, token, confidence: commits and replacements, [n]; `row` indexes the part's rows, `position` is
            relative to the region.
        filled: positions that became padding.
        drafts: tokens that would be committed now at open positions, by row; None if no row drafts.
    """

    commit: Tensor
    replaced: Tensor | None
    remask: Tensor | None
    row: Tensor
    position: Tensor
    token: Tensor
    confidence: Tensor
    filled: Filled = field(default_factory=list)
    drafts: list[list[int]] | None = None


def tell(
    part: Part, opened: Opened, changes: Changes, numbers: Tensor, errors: Mapping[int, SamplerError]
) -> list[StepEvent]:
    """One event per row, in order. `numbers` are the rows' integers after the step, [rows, CHANGING]."""
    grown = numbers[:, N.TOLD] - opened.numbers[:, N.TOLD]
    told_counts = grown.tolist()
    told = _newly_told(part, opened.numbers[:, N.TOLD], grown) if any(told_counts) else []
    counts = counts_of(changes.row, len(part.rows))
    positions, tokens, confidences = changes.position.tolist(), changes.token.tolist(), changes.confidence.tolist()
    events = []
    first = first_told = 0
    for row, now, count, more in zip(part.rows, numbers.tolist(), counts, told_counts, strict=True):
        row.now = now
        text: list[int] = []
        if more:
            text = row.tell(told[first_told : first_told + more])
            first_told += more
        own = slice(first, first + count)
        first += count
        forward = now[N.STEPS] * row.view_count
        # Empty lists are given since making them as defaults takes longer.
        events.append(
            StepEvent(forward, positions[own], tokens[own], confidences[own], [], row.reported, text, [], [], [])
        )
    _add_rest(part, opened, changes, events)
    for i, error in errors.items():
        events[i] = StepEvent(error=error)
    return events


def _add_rest(part: Part, opened: Opened, changes: Changes, events: list[StepEvent]) -> None:
    """Add fields to the events that only some steps or rules need."""
    if changes.filled:
        at = {row.slot: i for i, row in enumerate(part.rows)}
        for slot, places in changes.filled:
            events[at[slot]].filled += places
    if changes.replaced is not None:
        for event, replaced in zip(events, _by_row(changes.replaced, opened), strict=True):
            event.replaced = replaced
    if changes.remask is not None:
        for event, remasked in zip(events, _by_row(changes.remask, opened), strict=True):
            event.remasked = remasked
    if changes.drafts is not None:
        for event, draft in zip(events, changes.drafts, strict=True):
            event.draft = draft


def _newly_told(part: Part, before: Tensor, grown: Tensor) -> list[int]:
    """Tokens that became settled text with this step, `grown` [rows] of each row after its first `before` [rows]."""
    which = runs(part.flat_tokens + before, grown)
    told: list[int] = part.batch.tokens.view(-1).index_select(0, which).tolist()
    return told


def _by_row(which: Tensor, opened: Opened) -> list[list[int]]:
    """Region positions of True entries, by row."""
    return cut(opened.position[which].tolist(), which.sum(dim=1).tolist())


def cut(values: list[int], counts: list[int]) -> list[list[int]]:
    """A list cut into pieces of these lengths."""
    found, first = [], 0
    for count in counts:
        found.append(values[first : first + count])
        first += count
    return found
