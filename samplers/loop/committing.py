"""Execution of a decision on the canvases of all rows of a part."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samplers.loop.check import check_told
from samplers.loop.deciding import Decision, Errors
from samplers.loop.event import StepEvent
from samplers.loop.guard import ContractError, failure
from samplers.loop.masks import places
from samplers.loop.numbers import N
from samplers.loop.opened import Opened
from samplers.loop.part import Part
from samplers.loop.settling import note_part_ends, settle
from samplers.loop.telling import Changes, cut, tell


def commit(part: Part, opened: Opened, decision: Decision, errors: Errors) -> list[StepEvent]:
    """Write a decision, update the position of each row, and report it. One event per row, in order."""
    if not part.plain:
        _take_last_chance(opened, decision)
    changes = _changes(opened, part, decision, errors)
    if decision.own is not None and _find_wrong(part, opened, decision, changes, errors):
        changes = _changes(opened, part, decision, errors)
    if decision.draft is not None:
        changes.drafts = _write_drafts(part, opened, decision, changes, errors)
    left = _write(part, opened, changes)
    for i in part.keeping:
        row = part.rows[i]
        row.note_forward(opened.spans[i], row.block)
    changes.filled = note_part_ends(part, opened, changes, decision.done, left)
    numbers = settle(part, opened, left, changes.filled, errors)
    return tell(part, opened, changes, numbers, errors)


def _take_last_chance(opened: Opened, decision: Decision) -> None:
    """Commit everything in revised or drafted blocks that have used up their forwards."""
    n = opened.numbers
    revises, drafts = n[:, N.REVISES] > 0, n[:, N.DRAFTS] > 0
    bound = torch.where(revises, 2 * (n[:, N.STOP] - n[:, N.START]), 0) + n[:, N.MOST]
    last = (n[:, N.BLOCK_STEP] + 1 >= bound) & (revises | drafts)
    decision.commit = torch.where(last[:, None], opened.candidate, decision.commit)
    if decision.remask is not None:
        assert decision.done is not None
        decision.remask = decision.remask & ~last[:, None]
        decision.done = decision.done | last


def _changes(opened: Opened, part: Part, decision: Decision, errors: Errors) -> Changes:
    """Changes to write, except for rows that stop."""
    commit, replaced, remask = decision.commit, decision.replace, decision.remask
    if errors:
        commit, replaced, remask = commit.clone(), _cloned(replaced), _cloned(remask)
        for each in (commit, replaced, remask):
            if each is not None:
                each[list(errors)] = False
    flat = places(commit if replaced is None else commit | replaced)
    return Changes(
        commit,
        replaced,
        remask,
        part.row_grid.index_select(0, flat),
        opened.position.view(-1).index_select(0, flat),
        decision.token.reshape(-1).index_select(0, flat),
        decision.confidence.reshape(-1).index_select(0, flat),
    )


def _cloned(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()


def _write(part: Part, opened: Opened, changes: Changes) -> Tensor:
    """Write the changes to the canvases. Returns the remaining masks, bool [rows, width]."""
    batch = part.batch
    tokens, masked = batch.tokens.view(-1), batch.masked.view(-1)
    tokens.index_copy_(0, part.flat_tokens.index_select(0, changes.row) + changes.position, changes.token)
    masked.index_fill_(0, part.flat_masks.index_select(0, changes.row) + changes.position, False)
    left = opened.masked & ~changes.commit
    if changes.remask is None:
        return left
    flat = places(changes.remask)
    row = part.row_grid.index_select(0, flat)
    position = opened.position.view(-1).index_select(0, flat)
    tokens[part.flat_tokens[row] + position] = opened.numbers[row, N.MASK_ID]
    masked[part.flat_masks[row] + position] = True
    return left | changes.remask


@dataclass
class _Limits:
    """Tokens that a row may commit: below `vocabulary` [n] (-1: any), except `mask` [n] (-1: none)."""

    vocabulary: Tensor
    mask: Tensor

    @classmethod
    def of(cls, numbers: Tensor, row: Tensor) -> "_Limits":
        n = numbers.index_select(0, row)
        return cls(n[:, N.VOCABULARY], torch.where(n[:, N.NOISE] > 0, -1, n[:, N.MASK_ID]))


def _find_wrong(part: Part, opened: Opened, decision: Decision, changes: Changes, errors: Errors) -> bool:
    """Record errors of rows whose rule would commit an invalid token or confidence. True if there are any."""
    assert decision.own is not None
    n, limits = opened.numbers, _Limits.of(opened.numbers, changes.row)
    bad = check_told(changes.token, changes.confidence, limits.vocabulary, limits.mask) & decision.own[changes.row]
    wrong = set(changes.row[bad].tolist())
    if decision.draft is not None:
        flat = places(opened.candidate & ~changes.commit)
        row, tokens = part.row_grid[flat], decision.token.reshape(-1)[flat]
        limits = _Limits.of(n, row)
        bad = check_told(tokens, torch.zeros_like(tokens).float(), limits.vocabulary, limits.mask)
        wrong |= set(row[bad & decision.own[row] & (n[row, N.DRAFTS] > 0)].tolist())
    for i in sorted(wrong):
        looked = changes.commit[i] if decision.draft is None else changes.commit[i] | opened.candidate[i]
        fault = ContractError(_fault(part, i, decision.token[i][looked]))
        errors.setdefault(i, failure(part.rows[i].suspect, fault))
    return bool(wrong)


def _fault(part: Part, i: int, tokens: Tensor) -> str:
    """Description of the fault in a row's tokens, or else in its confidences."""
    vocabulary, mask_id = part.rows[i].vocabulary, part.rows[i].mask_id
    if bool((tokens < 0).any()) or (vocabulary is not None and bool((tokens >= vocabulary).any())):
        return "a token that does not exist was selected"
    if mask_id is not None and bool((tokens == mask_id).any()):
        return "the mask token was selected"
    return "a confidence is no probability"


def _write_drafts(part: Part, opened: Opened, decision: Decision, changes: Changes, errors: Errors) -> list[list[int]]:
    """Write drafts to positions that stay candidates. Returns the tokens that would be committed there now, by row."""
    assert decision.draft is not None
    still = opened.candidate & ~changes.commit & (opened.numbers[:, N.DRAFTS, None] > 0)
    if errors:
        still[list(errors)] = False
    row, column = still.nonzero(as_tuple=True)
    place = part.flat_tokens[row] + opened.position[row, column]
    part.batch.tokens.view(-1)[place] = decision.draft[row, column]
    return cut(decision.token[row, column].tolist(), still.sum(dim=1).tolist())
