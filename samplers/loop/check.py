"""A sampler's selection, held against the contract."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from samplers.contract import Sampler, SamplerError, Selection, Step
from samplers.loop.guard import INTEGERS, ContractError, Traits, plain, told
from samplers.ranking import best

_BOOLS = {"commit", "replace", "remask", "done"}
_TOKENS = {"token", "draft"}
_ROUNDING = 1e-4
"""By how much a probability that was computed may be above 1."""


def select(sampler: Sampler, traits: Traits, step: Step, may_wait: bool) -> list[Selection | SamplerError]:
    """Per row what to do, or why its generation fails. Where all together fail, each row is asked on its own."""
    try:
        return [*_by_row(told(sampler, _checked, sampler, traits, step, may_wait))]
    except SamplerError as error:
        found = error
    count = len(step.params)
    if count == 1:
        return [found]
    return [each for i in range(count) for each in select(sampler, traits, _one(step, i), may_wait)]


def check_told(tokens: list[int], confidences: list[float], vocabulary: int | None, mask_id: int | None) -> None:
    """Raise ContractError for tokens of a sampler's own that cannot be committed, or confidences that are none."""
    if tokens and (min(tokens) < 0 or (vocabulary is not None and max(tokens) >= vocabulary)):
        raise ContractError("a token that does not exist was selected")
    if mask_id is not None and mask_id in tokens:
        raise ContractError("the mask token was selected")
    if not all(0 <= confidence <= 1 + _ROUNDING for confidence in confidences):
        raise ContractError("a confidence is no probability")


def _tensors(step: Step) -> dict[str, Any]:
    return {name: value for name, value in vars(step).items() if isinstance(value, Tensor)}


def _copied(step: Step) -> Step:
    """A step that is the sampler's own: what it changes of it, now or later, is nothing to the loop."""
    lists: dict[str, Any] = {name: list(getattr(step, name)) for name in ("params", "states")}
    lists["layouts"] = [layout.twin for layout in step.layouts]
    extra = {name: value.clone() for name, value in step.extra.items()}
    return replace(step, **{name: value.clone() for name, value in _tensors(step).items()}, **lists, extra=extra)


def _one(step: Step, i: int) -> Step:
    """A step of a single one of its rows."""
    lists: dict[str, Any] = {name: getattr(step, name)[i : i + 1] for name in ("params", "layouts", "states")}
    extra = {name: value[i : i + 1] for name, value in step.extra.items()}
    return replace(step, **{name: value[i : i + 1] for name, value in _tensors(step).items()}, **lists, extra=extra)


def _by_row(selection: Selection) -> list[Selection]:
    """A selection row by row."""
    given = {name: value for name, value in vars(selection).items() if value is not None and name != "waits"}
    rows = zip(*(value.unbind() if isinstance(value, Tensor) else value for value in given.values()), strict=True)
    return [Selection(**dict(zip(given, row, strict=True)), waits=selection.waits) for row in rows]


def _own(selection: object, step: Step) -> Selection:
    """A sampler's selection as a plain one, each of its fields read once. Raises ContractError."""
    if not isinstance(selection, Selection):
        raise ContractError("select must return a Selection")
    shape = tuple(step.candidate.shape)
    given = {each.name: getattr(selection, each.name) for each in fields(Selection)}
    found: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for name in found.keys() - {"waits", "states", "done"}:
        found[name] = plain(found[name], f"a selection's {name}", shape)
    if "done" in found:
        found["done"] = plain(found["done"], "a selection's done", shape[:1])
    if "commit" not in found or any(found[name].dtype != torch.bool for name in _BOOLS & found.keys()):
        raise ContractError("a selection's commit must be there and bool; so must replace, remask and done, if given")
    if any(found[name].dtype not in INTEGERS for name in _TOKENS & found.keys()):
        raise ContractError("a selection's tokens must be integers")
    if "confidence" in found and not found["confidence"].is_floating_point():
        raise ContractError("a selection's confidences must be floats")
    if "states" in found:
        found["states"] = _states(found["states"], shape[0])
    found["waits"] = bool(found.get("waits"))
    return Selection(**found)


def _states(states: Any, rows: int) -> Sequence[Any]:
    if len(states) != rows:
        raise ContractError(f"there must be a state for each of {rows} rows")
    return [states[i] for i in range(rows)]


def _checked(sampler: Sampler, traits: Traits, step: Step, may_wait: bool) -> Selection:
    """The sampler's selection, with the surest candidate where a row commits none."""
    selection = _own(sampler.select(_copied(step)), step)
    commit = selection.commit
    if bool((commit & ~step.candidate).any()):
        raise ContractError("a position that is no candidate was selected")
    if bool((step.candidate & (step.confidence == -torch.inf)).any()):
        raise ContractError("the forward pass said nothing of a candidate")
    if selection.waits and not may_wait:
        raise ContractError("it waits, which only training may: a generation that waits holds its place for ever")
    if traits.revises:
        return _checked_revision(selection, step)
    if not (selection.replace is selection.remask is selection.done is None):
        raise ContractError("this sampler does not say that it revises")
    if traits.drafts:
        return _checked_draft(selection, step)
    if selection.draft is not None:
        raise ContractError("this sampler does not say that it drafts")
    if selection.waits:
        return selection
    return replace(selection, commit=_at_least_one(commit, step))


def _at_least_one(commit: Tensor, step: Step) -> Tensor:
    none = ~commit.any(dim=1, keepdim=True)
    if not bool(none.any()):
        return commit
    return commit | (best(step.confidence, step.candidate, torch.ones_like(step.forward)) & none)


def _checked_draft(selection: Selection, step: Step) -> Selection:
    """A draft of the candidates is there, and of tokens that there are."""
    draft = selection.draft
    if draft is None:
        raise ContractError("a sampler that drafts must say what the candidates hold")
    draft = draft.long()
    sizes = torch.tensor([layout.pattern.noise or 0 for layout in step.layouts])[:, None]
    if bool((((draft < 0) | (draft >= sizes)) & step.candidate).any()):
        raise ContractError("a token that does not exist was drafted")
    return replace(selection, draft=draft)


def _checked_revision(selection: Selection, step: Step) -> Selection:
    """Replacements and new masks stay within what was committed of the active block, and outside what was given."""
    nothing = torch.zeros_like(selection.commit)
    changed = selection.replace if selection.replace is not None else nothing
    masked = selection.remask if selection.remask is not None else nothing
    may_change = (step.confidence > -torch.inf) & ~step.masked
    assert step.given is not None
    if bool(((changed | masked) & ~(may_change & ~step.given)).any()) or bool((changed & masked).any()):
        raise ContractError("a position that cannot be revised was selected")
    if selection.done is None:
        raise ContractError("a sampler that revises must say which blocks are done")
    commit = _at_least_one(selection.commit, step)
    done = selection.done & ~((step.candidate & ~commit) | masked).any(dim=1)
    return replace(selection, commit=commit, replace=changed, remask=masked, done=done)
