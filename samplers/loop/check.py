"""Validation of the answers of samplers and modifiers in a step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from samplers.columns import Columns
from samplers.contract import Adjustment, Modifier, Sampler, SamplerError, Selection, StateSpec, Step
from samplers.loop.guard import INTEGERS, MOST_NUMBERS, ContractError, is_ours, plain, told
from samplers.loop.masks import anywhere
from samplers.loop.traits import Traits

_BOOLS = ("commit", "replace", "remask")
_TOKENS = ("token", "draft")
_ROUNDING = 1e-4
"""Tolerance by which a computed probability may exceed 1."""

States = list[Mapping[str, Tensor]]
"""New state of a rule and of each of its modifiers."""


@dataclass(frozen=True)
class Chosen:
    """The decision for some rows: a validated selection, the step as the rule saw it, and new states.

    `adjusted`: True if modifiers changed tokens or confidences of the step.
    """

    selection: Selection
    step: Step[Any]
    states: States
    adjusted: bool


def choose(
    sampler: Sampler[Any],
    modifiers: Sequence[Modifier[Any]],
    traits: Traits,
    steps: Sequence[Step[Any]],
    may_wait: bool,
) -> Chosen | list[Chosen | SamplerError]:
    """Ask sampler and modifiers for the decision; if that fails, ask for each row alone and return a list.

    Args:
        steps: the step as seen by the rule and by each of the modifiers.
        may_wait: True if a rule may commit nothing.
    """
    try:
        return _choose(sampler, modifiers, traits, steps, may_wait)
    except SamplerError as error:
        found = error
    rows = len(steps[0].candidate)
    if rows == 1:
        return [found]
    each: list[Chosen | SamplerError] = []
    for i in range(rows):
        part = choose(sampler, modifiers, traits, [one(step, i) for step in steps], may_wait)
        each += part if isinstance(part, list) else [part]
    return each


def _choose(
    sampler: Sampler[Any],
    modifiers: Sequence[Modifier[Any]],
    traits: Traits,
    steps: Sequence[Step[Any]],
    may_wait: bool,
) -> Chosen:
    step, *around = steps
    states: States = [{}]
    adjusted = False
    for i, (modifier, own) in enumerate(zip(modifiers, around, strict=True), 1):
        states.append({})
        if "adjust" in traits.hooks[i]:
            seen = replace(own, token=step.token, confidence=step.confidence, candidate=step.candidate)
            found = told(modifier, _adjusted, modifier, dict(traits.state[i]), seen)
            if found is not None:
                step = replace(step, **{name: each for name, each in _given(found).items() if name != "state"})
                states[i] = found.state or {}
                adjusted = adjusted or found.token is not None or found.confidence is not None
    selection = told(sampler, _selected, sampler, dict(traits.state[0]), step)
    states[0] = selection.state or {}
    if not all(is_ours(type(modifier)) for modifier in modifiers):  # otherwise the modifiers would be blamed
        told(sampler, _within_contract, traits, step, selection, may_wait)
    for i, (modifier, own) in enumerate(zip(modifiers, around, strict=True), 1):
        if "after" in traits.hooks[i]:
            seen = replace(own, token=step.token, confidence=step.confidence, candidate=step.candidate)
            selection = told(modifier, _filtered, modifier, seen, selection)
            if not is_ours(type(modifier)):
                told(modifier, _within_contract, traits, step, selection, may_wait)
    return Chosen(told(sampler, _within_contract, traits, step, selection, may_wait), step, states, adjusted)


def _given(found: Any) -> dict[str, Any]:
    return {each.name: value for each in fields(found) if (value := getattr(found, each.name)) is not None}


def _adjusted(modifier: Modifier[Any], specs: dict[str, StateSpec], step: Step[Any]) -> Adjustment | None:
    ours = is_ours(type(modifier))
    found: object = modifier.adjust(step if ours else copied(step))
    if found is None or ours:
        return found  # type: ignore[return-value]
    if not isinstance(found, Adjustment):
        raise ContractError("adjust must return an Adjustment or None")
    shape, given = tuple(step.candidate.shape), _given(found)
    for name in given.keys() - {"state"}:
        given[name] = plain(given[name], f"an adjustment's {name}", step.candidate, shape)
    if "token" in given and given["token"].dtype not in INTEGERS:
        raise ContractError("an adjustment's tokens must be integers")
    if "confidence" in given and not given["confidence"].is_floating_point():
        raise ContractError("an adjustment's confidences must be floats")
    if "candidate" in given and (
        given["candidate"].dtype != torch.bool or bool((given["candidate"] & ~step.candidate).any())
    ):
        raise ContractError("an adjustment's candidates must be bool, and some of those there were")
    if "candidate" in given and bool((step.candidate.any(dim=1) & ~given["candidate"].any(dim=1)).any()):
        raise ContractError("an adjustment leaves no candidate")
    if "state" in given:
        given["state"] = _state(given["state"], specs, step)
    return Adjustment(**given)


def _selected(sampler: Sampler[Any], specs: dict[str, StateSpec], step: Step[Any]) -> Selection:
    ours = is_ours(type(sampler))
    found = sampler.select(step if ours else copied(step))
    return found if ours else _own(found, specs, step)


def _filtered(modifier: Modifier[Any], step: Step[Any], selection: Selection) -> Selection:
    if is_ours(type(modifier)):
        return modifier.after(step, selection)
    state = selection.state
    shown = replace(selection, state=None)
    shown = _copy_of(shown)
    return replace(_own(modifier.after(copied(step), shown), {}, step), state=state)


def _copy_of(selection: Selection) -> Selection:
    """A selection with tensors of its own."""
    tensors: dict[str, Any] = {n: v.clone() for n, v in _given(selection).items() if isinstance(v, Tensor)}
    return replace(selection, **tensors)


def _own(selection: object, specs: dict[str, StateSpec], step: Step[Any]) -> Selection:
    """A sampler's selection as a plain one, each of its fields read once. Raises ContractError."""
    if not isinstance(selection, Selection):
        raise ContractError("select must return a Selection")
    shape, found = tuple(step.candidate.shape), _given(selection)
    for name in found.keys() - {"waits", "state", "done"}:
        found[name] = plain(found[name], f"a selection's {name}", step.candidate, shape)
    if "done" in found:
        found["done"] = plain(found["done"], "a selection's done", step.candidate, shape[:1])
    if "commit" not in found or any(found[name].dtype != torch.bool for name in (*_BOOLS, "done") if name in found):
        raise ContractError("a selection's commit must be there and bool; so must replace, remask and done, if given")
    if any(found[name].dtype not in INTEGERS for name in _TOKENS if name in found):
        raise ContractError("a selection's tokens must be integers")
    if "confidence" in found and not found["confidence"].is_floating_point():
        raise ContractError("a selection's confidences must be floats")
    if "state" in found:
        found["state"] = _state(found["state"], specs, step)
    found["waits"] = bool(found.get("waits"))
    return Selection(**found)


def _state(state: object, specs: dict[str, StateSpec], step: Step[Any]) -> dict[str, Tensor]:
    """New values of a rule's state, each a tensor of its spec's shape and type. Raises ContractError."""
    if not isinstance(state, Mapping):
        raise ContractError("a selection's state must be tensors by name")
    rows, width = step.candidate.shape
    found = {}
    for name, value in dict(state).items():
        if name not in specs:
            raise ContractError("it keeps a state that it has not declared")
        spec = specs[name]
        first = (rows, width if spec.per == "position" else 1)
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        last = shape[2:-1] == spec.shape[:-1] and (not spec.shape or shape[-1] >= spec.shape[-1])
        if shape[:2] != first or len(shape) != 2 + len(spec.shape) or not last or shape[-1] > max(MOST_NUMBERS, width):
            raise ContractError(f"a state must be a tensor of shape {[*first, *spec.shape]}")
        tensor = plain(value, "a state", step.candidate, shape)
        if tensor.dtype != spec.dtype:
            raise ContractError(f"a state must be of type {spec.dtype}")
        found[name] = tensor
    return found


def _within_contract(traits: Traits, step: Step[Any], selection: Selection, may_wait: bool) -> Selection:
    """Check a selection against the permissions of its rule. Raises ContractError."""
    if anywhere(selection.commit > step.candidate):
        raise ContractError("a position that is no candidate was selected")
    if selection.waits and not may_wait:
        raise ContractError("it waits, which only training may: a generation that waits holds its place for ever")
    if traits.revises:
        return _revision(selection, step)
    if not (selection.replace is selection.remask is selection.done is None):
        raise ContractError("this sampler does not say that it revises")
    if traits.drafts:
        return _draft(selection, step)
    if selection.draft is not None:
        raise ContractError("this sampler does not say that it drafts")
    return selection


def _draft(selection: Selection, step: Step[Any]) -> Selection:
    """Check the draft: one for all candidates, with tokens of the vocabulary."""
    draft = selection.draft
    if draft is None:
        raise ContractError("a sampler that drafts must say what the candidates hold")
    if bool((((draft < 0) | (draft >= step.layout.noise)) & step.candidate).any()):
        raise ContractError("a token that does not exist was drafted")
    return selection


def _revision(selection: Selection, step: Step[Any]) -> Selection:
    """Check that replacements and remasks are of `committed` positions, which excludes those reported as settled."""
    nothing = torch.zeros_like(selection.commit)
    changed = selection.replace if selection.replace is not None else nothing
    masked = selection.remask if selection.remask is not None else nothing
    if bool(((changed | masked) & ~step.committed).any()) or bool((changed & masked).any()):
        raise ContractError("a position that cannot be revised was selected")
    done = selection.done
    if done is None:
        done = torch.ones(len(nothing), dtype=torch.bool, device=nothing.device)
    return replace(selection, replace=changed, remask=masked, done=done)


def check_told(token: Tensor, confidence: Tensor, vocabulary: Tensor, mask_id: Tensor) -> Tensor:
    """Mask of entries that cannot be committed, [n]: tokens outside the vocabulary, mask tokens, invalid confidences.

    All arguments are [n]. A negative vocabulary or mask token is unknown and not checked.
    """
    there = (token >= 0) & ((vocabulary < 0) | (token < vocabulary)) & ((mask_id < 0) | (token != mask_id))
    return ~(there & (confidence >= 0) & (confidence <= 1 + _ROUNDING))


C = Any


def copied(context: C) -> C:
    """A copy of a step or context for the sampler: its changes do not affect the loop."""
    changes: dict[str, Any] = {n: v.clone() for n, v in vars(context).items() if isinstance(v, Tensor)}
    changes["params"] = list(context.params)
    changes["columns"] = Columns(context.columns.spec, context.columns.values.clone())
    changes["state"] = {name: value.clone() for name, value in context.state.items()}
    changes["layout"] = replace(context.layout, **{n: v.clone() for n, v in vars(context.layout).items()})
    if isinstance(context, Step):
        changes["extra"] = {name: value.clone() for name, value in context.extra.items()}
    return replace(context, **changes)


def take(context: C, rows: Tensor) -> C:
    """Some rows, int64 [n], of a step or context."""
    changes: dict[str, Any] = {n: v[rows] for n, v in vars(context).items() if isinstance(v, Tensor)}
    changes["canvas"] = context.canvas.take(rows)
    changes["params"] = [context.params[i] for i in rows.tolist()]
    changes["columns"] = Columns(context.columns.spec, context.columns.values[rows])
    changes["state"] = {name: value[rows] for name, value in context.state.items()}
    changes["layout"] = replace(context.layout, **{n: v[rows] for n, v in vars(context.layout).items()})
    if isinstance(context, Step):
        changes["extra"] = {name: value[rows] for name, value in context.extra.items()}
    return replace(context, **changes)


def one(context: C, i: int) -> C:
    """A single row of a step or context."""
    return take(context, torch.tensor([i], device=context.candidate.device))
