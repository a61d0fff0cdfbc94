"""Decisions: ask the rule and modifiers of every group, and merge their answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.contract import SamplerError, Step
from samplers.loop.check import Chosen, choose, take
from samplers.loop.contexts import context, keep
from samplers.loop.grid import Grid
from samplers.loop.guard import ContractError, failure
from samplers.loop.masks import anywhere, rows_of, some_of_rows
from samplers.loop.opened import Opened
from samplers.loop.part import Members, Part
from samplers.ranking import first_of_largest, surest

Errors = dict[int, SamplerError]
"""Rows of a part that stop, with their errors."""


@dataclass
class Decision:
    """The decision for the rows of a part or a group, [rows, width].

    Attributes:
        own: rows whose rule or modifiers set token or confidence themselves, bool [rows]; None: no rows.
        replace, remask, done: present if the part has revising rows.
        draft: present if it has drafting rows.
        whole: True if every row that must commit does.
    """

    commit: Tensor
    token: Tensor
    confidence: Tensor
    own: Tensor | None = None
    replace: Tensor | None = None
    remask: Tensor | None = None
    done: Tensor | None = None
    draft: Tensor | None = None
    whole: bool = False


def decide(part: Part, opened: Opened, grid: Grid, may_wait: bool, errors: Errors) -> Decision:
    """Ask every group and merge the answers."""
    if part.any_wide:  # only then can a candidate lie outside the requested positions
        silent = opened.candidate & (grid.confidence == -torch.inf)
        for i in rows_of(silent) if anywhere(silent) else ():
            fault = ContractError("the forward pass said nothing of a candidate")
            errors.setdefault(i, failure(part.rows[i].sampler, fault))
    each = [_of_group(part, opened, grid, members, may_wait, errors) for members in part.members]
    found = each[0] if len(each) == 1 else _joined(each, grid)
    _commit_something(part, opened, grid, each, found)
    return found


def _commit_something(part: Part, opened: Opened, grid: Grid, each: list[Decision], found: Decision) -> None:
    """Commit the candidate of highest confidence in rows whose rule commits nothing."""
    if all(one.whole for one in each):
        return
    idle = ~some_of_rows(found.commit)[:, None]
    for one, members in zip(each, part.members, strict=True):
        if one.whole:
            idle[members.start : members.stop] = False
    if not anywhere(idle):
        return
    if part.any_wide:
        found.commit = found.commit | (surest(grid.confidence, opened.candidate) & idle)
        return
    # If only candidates were requested, the confidence elsewhere is minus infinity.
    place = first_of_largest(grid.confidence)
    more = idle & opened.candidate.gather(1, place)
    found.commit = found.commit.scatter(1, place, more | found.commit.gather(1, place))


def _joined(each: list[Decision], grid: Grid) -> Decision:
    """The merged decisions of all groups."""

    def join(name: str, empty: Callable[[Decision], Tensor]) -> Tensor | None:
        found = [getattr(one, name) for one in each]
        if all(value is None for value in found):
            return None
        return torch.cat([empty(one) if value is None else value for one, value in zip(each, found, strict=True)])

    own = join("own", lambda one: one.commit.new_zeros(len(one.commit)))
    changed = own is not None
    model = grid.confidence if grid.probability is None else grid.probability
    return Decision(
        torch.cat([one.commit for one in each]),
        torch.cat([one.token for one in each]) if changed else grid.token,
        torch.cat([one.confidence for one in each]) if changed else model,
        own,
        join("replace", lambda one: torch.zeros_like(one.commit)),
        join("remask", lambda one: torch.zeros_like(one.commit)),
        join("done", lambda one: one.commit.new_ones(len(one.commit))),
        join("draft", lambda one: torch.full_like(one.token, -1)),
    )


def _steps(part: Part, opened: Opened, grid: Grid, members: Members) -> list[Step[Any]]:
    """The step of one group, as seen by its rule and by each modifier."""
    told: dict[str, Any] = {
        "token": opened.piece("token", grid.token, part, members),
        "confidence": opened.piece("confidence", grid.confidence, part, members),
        "extra": grid.extra(members),
        "top": grid.top(members),
    }
    if grid.probability is not None:
        told["probability"] = opened.piece("probability", grid.probability, part, members)
    return [
        context(part, opened, members, layer, Step, named=grid.named(members, layer), **told)
        for layer in range(len(members.group.layers))
    ]


def _of_group(part: Part, opened: Opened, grid: Grid, members: Members, may_wait: bool, errors: Errors) -> Decision:
    """Decision for the rows of a group. If the joint call fails, each row is asked alone."""
    steps = _steps(part, opened, grid, members)
    rows = list(range(len(members.rows)))
    if errors:
        rows = [i for i in rows if members.start + i not in errors]
        if not rows:
            return _nothing(part, grid, members)
        if len(rows) < len(members.rows):
            steps = [take(step, torch.tensor(rows, device=part.batch.device)) for step in steps]
    found = choose(members.sampler, members.modifiers, members.traits, steps, may_wait)
    if isinstance(found, Chosen):
        if len(rows) == len(members.rows):
            _keep(part, opened, members, None, found)
            return _decision_of(found, members)
        answers: list[tuple[list[int], Chosen | SamplerError]] = [(rows, found)]
    else:
        answers = [([i], each) for i, each in zip(rows, found, strict=True)]
    out = _nothing(part, grid, members)
    for some, each in answers:
        if isinstance(each, SamplerError):
            errors[members.start + some[0]] = each
            continue
        at = torch.tensor(some, device=part.batch.device)
        _keep(part, opened, members, at + members.start, each)
        decision = _decision_of(each, members)
        if not decision.whole:
            step = each.step
            decision.commit = _with_surest(decision.commit, step.confidence, step.candidate)
        _put(out, at, decision)
    return out


def _keep(part: Part, opened: Opened, members: Members, index: Tensor | None, chosen: Chosen) -> None:
    for layer, states in enumerate(chosen.states):
        if states:
            keep(part, opened, members, layer, index, dict(states))


def _nothing(part: Part, grid: Grid, members: Members) -> Decision:
    """A decision that leaves a group's rows unchanged."""
    a, b = members.start, members.stop
    model = grid.confidence if grid.probability is None else grid.probability
    out = Decision(torch.zeros_like(part.nowhere[a:b]), grid.token[a:b], model[a:b], whole=True)
    if members.traits.revises:
        out.replace, out.remask = torch.zeros_like(out.commit), torch.zeros_like(out.commit)
        out.done = out.commit.new_zeros(b - a)
    return out


def _put(out: Decision, at: Tensor, value: Decision) -> None:
    """Write the decision for some rows into that for all."""
    for name, each in vars(value).items():
        if not isinstance(each, Tensor):
            continue
        have = getattr(out, name)
        if have is None:
            have = each.new_zeros((len(out.commit), *each.shape[1:]))
        elif name in ("token", "confidence"):
            have = have.clone()
        have[at] = each
        setattr(out, name, have)


def _with_surest(commit: Tensor, confidence: Tensor, candidate: Tensor) -> Tensor:
    """Commits, with the candidate of highest confidence added in rows that have none."""
    some = some_of_rows(commit)[:, None]
    return commit | (surest(confidence, candidate) & ~some)


def _decision_of(chosen: Chosen, members: Members) -> Decision:
    """Convert a validated selection to a decision."""
    selection, step, traits = chosen.selection, chosen.step, members.traits
    commit = selection.commit
    whole = selection.waits or traits.drafts
    if not whole and (traits.revises or len(members.group.layers) > 1):
        # Only here are the candidates left by modifiers, and the end of a revised block, known.
        commit, whole = _with_surest(commit, step.confidence, step.candidate), True
    own = selection.token is not None or selection.confidence is not None or chosen.adjusted
    model = step.confidence if step.probability is None or chosen.adjusted else step.probability
    out = Decision(
        commit,
        step.token if selection.token is None else selection.token.long(),
        model if selection.confidence is None else selection.confidence.float(),
        torch.ones(len(commit), dtype=torch.bool, device=commit.device) if own else None,
        whole=whole,
    )
    if traits.revises:
        assert selection.replace is not None and selection.remask is not None and selection.done is not None
        out.replace, out.remask = selection.replace, selection.remask
        out.done = selection.done & ~some_of_rows((step.candidate & ~commit) | selection.remask)
    if selection.draft is not None:
        out.draft = selection.draft.long()
    return out
