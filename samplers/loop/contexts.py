"""Contexts for rules and modifiers, and their state."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from samplers.contract import CanvasReader, SamplerError, StepContext
from samplers.loop import guard
from samplers.loop.check import copied, one
from samplers.loop.numbers import N
from samplers.loop.opened import Opened
from samplers.loop.part import Members, Part


def context(
    part: Part, opened: Opened, members: Members, layer: int, kind: Callable[..., Any] = StepContext, **more: Any
) -> Any:
    """Context of a rule (layer 0) or a modifier: an object of class `kind`, with `more` as further fields."""
    c = opened.columns(part, members)
    position = opened.piece("position", opened.position, part, members)
    return kind(
        candidate=opened.piece("candidate", opened.candidate, part, members),
        masked=opened.piece("masked", opened.masked, part, members),
        committed=opened.piece("committed", opened.committed, part, members),
        position=position,
        seed=members.seed,
        forward=c[N.STEPS],
        block=c[N.BLOCK],
        block_start=c[N.START],
        block_step=c[N.BLOCK_STEP],
        block_masks=c[N.BLOCK_MASKS],
        slot=members.slot,
        layout=members.layout,
        params=members.params[layer],
        columns=members.columns[layer],
        state=_state(part, members, layer, position),
        canvas=CanvasReader(part.batch.tokens, members.row),
        **more,
    )


def _state(part: Part, members: Members, layer: int, position: Tensor) -> dict[str, Tensor]:
    """State of a rule or modifier for these rows, in their windows."""
    own, found = members.group.layers[layer], {}
    for name, spec in own.specs.items():
        kept = own.state[name]
        if spec.per == "row":
            found[name] = kept[members.slots]
        elif part.zero_based:
            found[name] = kept[:, : part.width][members.slots]
        else:
            found[name] = kept[members.row, position]
    return found


def keep(
    part: Part, opened: Opened, members: Members, layer: int, index: Tensor | None, states: dict[str, Tensor]
) -> None:
    """Write new state of some rows of the part (`index`), or of all members."""
    own = members.group.layers[layer]
    at = slice(members.start, members.stop) if index is None else index
    slots, position = part.slots[at], opened.position[at]
    for name, value in states.items():
        own.widen(name, value.shape[-1])
        kept, spec = own.state[name], own.specs[name]
        if spec.shape and kept.shape[-1] > value.shape[-1]:
            value = torch.nn.functional.pad(value, (0, kept.shape[-1] - value.shape[-1]), value=spec.fill)
        if spec.per == "row":
            kept[slots] = value
            continue
        kept[slots[:, None], position] = value
        if not part.zero_based:  # clear the column that stands for no position
            kept[slots, -1] = spec.fill


def answers(
    part: Part, opened: Opened, members: Members, layer: int, hook: Callable[[StepContext[Any]], Any]
) -> Iterator[tuple[Tensor, Any]]:
    """Answers of a hook, with the rows of the part that each applies to.

    If the joint call fails, each row is asked alone. Answers of None are left out. Errors of rows are recorded in
    `Opened.failed`.
    """
    seen = context(part, opened, members, layer)
    if not guard.is_ours(type(members.group.layers[layer].owner)):
        seen = copied(seen)
    index = torch.arange(members.start, members.stop, device=part.batch.device)
    try:
        found = [(index, hook(seen))]
    except SamplerError as error:
        found = [] if len(index) > 1 else [(index, error)]
    if not found:
        seen = context(part, opened, members, layer)
        found = [(index[i : i + 1], _alone(seen, i, members, layer, hook)) for i in range(len(index))]
    for at, answer in found:
        if isinstance(answer, SamplerError):
            opened.failed.setdefault(int(at[0]), answer)
        elif answer is not None:
            yield at, answer


def _alone(seen: Any, i: int, members: Members, layer: int, hook: Callable[[StepContext[Any]], Any]) -> Any:
    """Answer of a hook for a single row, or its error."""
    ours = guard.is_ours(type(members.group.layers[layer].owner))
    try:
        return hook(one(seen, i) if ours else copied(one(seen, i)))
    except SamplerError as error:
        return error
