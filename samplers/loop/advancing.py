"""From a prediction to the next canvases: rules select, and the loop commits for all rows of a part at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samplers.contract import SamplerError, Step
from samplers.forward.prediction import Prediction
from samplers.forward.statistics import Statistic, StatisticsRequest
from samplers.loop.check import Chosen, check_told, choose, take
from samplers.loop.event import StepEvent
from samplers.loop.guard import ContractError, Owner, failure, suspect
from samplers.loop.numbers import CHANGING, N
from samplers.loop.part import Members, Opened, Part
from samplers.loop.window import close, enter, note_ends, told_stop
from samplers.ranking import surest


@dataclass
class Grid:
    """A prediction by row and window column, [rows, width]; see `Step`."""

    token: Tensor
    confidence: Tensor
    probability: Tensor | None
    extra: dict[Statistic, Tensor]
    top: Tensor | None
    named: Tensor | None


@dataclass
class Decision:
    """What to do in each row of a part, [rows, width].

    Attributes:
        own: rows whose rule or modifiers say token or confidence themselves, bool [rows]; None: none do.
        replace, remask, done: where a part has rows that revise.
        draft: where it has rows that draft.
    """

    commit: Tensor
    token: Tensor
    confidence: Tensor
    own: Tensor | None = None
    replace: Tensor | None = None
    remask: Tensor | None = None
    done: Tensor | None = None
    draft: Tensor | None = None


def advance(
    part: Part, opened: Opened, prediction: Prediction, may_wait: bool, broken: Mapping[int, SamplerError]
) -> list[StepEvent]:
    """Let each rule select among its rows' candidates, and commit. One event a row, in order.

    A row whose prediction is not finite, or whose sampler fails or breaks the contract, gets an error as its event
    and goes no further; the others are not affected.

    Args:
        may_wait: whether a rule may commit nothing (`Selection.waits`), for drivers that bound the forwards.
        broken: rows of which the forward pass told nothing, and why.
    """
    errors: dict[int, SamplerError] = {**opened.failed, **broken}
    _find_not_finite(part, opened, prediction, errors)
    grid = _grid(part, opened, prediction)
    if part.revising:
        opened.committed = opened.committed & (grid.confidence > -torch.inf)
    decision = _decide(part, opened, grid, may_wait, errors)
    return _commit(part, opened, decision, errors)


def _find_not_finite(part: Part, opened: Opened, prediction: Prediction, errors: dict[int, SamplerError]) -> None:
    finite = prediction.confidence.isfinite()
    if bool(finite.all()):
        return
    row = opened.asked.nonzero(as_tuple=True)[0]
    for i in row[~finite].unique().tolist():
        errors.setdefault(i, SamplerError("the model's output is not finite"))


def blame_bonus(
    part: Part, wanted: StatisticsRequest, opened: Opened, prediction: Prediction
) -> dict[int, SamplerError]:
    """Rows whose output is not finite with a bonus of their sampler's."""
    if wanted.bonus is None:
        return {}
    finite = prediction.confidence.isfinite()
    if bool(finite.all()):
        return {}
    row = opened.asked.nonzero(as_tuple=True)[0]
    touched = set(row[wanted.bonus.index].tolist())
    return {
        i: failure(_suspect(part, i), ContractError("with its bonus the model's output is not finite"))
        for i in row[~finite].unique().tolist()
        if i in touched
    }


def _suspect(part: Part, i: int) -> Owner:
    row = part.rows[i]
    return suspect(row.sampler, [modifier for modifier, _ in row.modifiers])


def _grid(part: Part, opened: Opened, prediction: Prediction) -> Grid:
    asked = opened.asked
    shape = tuple(asked.shape)

    def grid(values: Tensor, empty: float) -> Tensor:
        out = values.new_full((*shape, *values.shape[1:]), empty)
        if values.dim() == 1:
            return out.masked_scatter_(asked, values)
        out[asked] = values
        return out

    token, confidence = grid(prediction.token, -1), grid(prediction.confidence, -torch.inf)
    extra = {name: grid(values, torch.nan) for name, values in prediction.extra.items()}
    probability = None
    if opened.judged is not None and bool(opened.judged.any()):
        probability = confidence
        told = opened.judged[:, None] & asked
        confidence = torch.where(told, extra[Statistic.CHOSEN_CONFIDENCE], confidence)
    return Grid(
        token,
        confidence,
        probability,
        extra,
        None if prediction.top is None else grid(prediction.top, torch.nan),
        None if prediction.named is None else grid(prediction.named, 0.0),
    )


def _steps(part: Part, opened: Opened, grid: Grid, number: int) -> list[Step[Any]]:
    """The step as the rule of one group, and as each modifier around it sees it."""
    members = part.members[number]
    a, b = members.start, members.stop
    traits = members.traits

    def some(values: Tensor) -> Tensor:
        return values[a:b] if b - a < len(part.rows) else values

    told: dict[str, Any] = {
        "token": some(grid.token),
        "confidence": some(grid.confidence),
        "extra": {name: some(values) for name, values in grid.extra.items() if name in traits.statistics},
        "top": some(grid.top)[:, :, : traits.top] if grid.top is not None and traits.top else None,
        "probability": None if grid.probability is None else some(grid.probability),
    }
    steps = []
    for layer in range(len(members.owners)):
        named = None
        if (bounds := opened.named.get((number, layer))) is not None and grid.named is not None:
            named = some(grid.named)[:, :, bounds[0] : bounds[1]]
        steps.append(part.context(opened, members, layer, Step, named=named, **told))
    return steps


def _decide(part: Part, opened: Opened, grid: Grid, may_wait: bool, errors: dict[int, SamplerError]) -> Decision:
    """Ask every group, and put together what they say."""
    silent = opened.candidate & (grid.confidence == -torch.inf)
    if bool(silent.any()):
        for i in silent.any(dim=1).nonzero()[:, 0].tolist():
            fault = ContractError("the forward pass said nothing of a candidate")
            errors.setdefault(i, failure(part.rows[i].sampler, fault))
    each = [_group_decision(part, opened, grid, number, may_wait, errors) for number in range(len(part.members))]
    if len(each) == 1:
        return each[0]

    def join(name: str, empty: Any) -> Any:
        found = [getattr(one, name) for one in each]
        if all(value is None for value in found):
            return None
        filled = [empty(one) if value is None else value for one, value in zip(each, found, strict=True)]
        return torch.cat(filled)

    return Decision(
        torch.cat([one.commit for one in each]),
        torch.cat([one.token for one in each]),
        torch.cat([one.confidence for one in each]),
        join("own", lambda one: one.commit.new_zeros(len(one.commit))),
        join("replace", lambda one: torch.zeros_like(one.commit)),
        join("remask", lambda one: torch.zeros_like(one.commit)),
        join("done", lambda one: one.commit.new_ones(len(one.commit))),
        join("draft", lambda one: torch.full_like(one.token, -1)),
    )


def _group_decision(
    part: Part, opened: Opened, grid: Grid, number: int, may_wait: bool, errors: dict[int, SamplerError]
) -> Decision:
    members = part.members[number]
    steps = _steps(part, opened, grid, number)
    sampler, *modifiers = members.owners
    index: Tensor | None = None
    if errors:
        good = [i for i in range(len(members.rows)) if members.start + i not in errors]
        if not good:
            return _nothing(part, members, grid)
        if len(good) < len(members.rows):
            index = torch.tensor(good, device=part.batch.device)
            steps = [take(step, index) for step in steps]
    found = choose(sampler, modifiers, members.traits, steps, may_wait)
    if isinstance(found, Chosen) and index is None:
        _keep(part, opened, members, None, found)
        return _decision_of(found, members)
    out = _nothing(part, members, grid)
    parts = [found] if isinstance(found, Chosen) else found
    places = list(range(len(members.rows))) if index is None else index.tolist()
    for place, each in zip([places] if isinstance(found, Chosen) else [[i] for i in places], parts, strict=True):
        if isinstance(each, SamplerError):
            errors[members.start + place[0]] = each
            continue
        at = torch.tensor(place, device=part.batch.device)
        _keep(part, opened, members, at + members.start, each)
        _put(out, at, _decision_of(each, members))
    return out


def _keep(part: Part, opened: Opened, members: Members, index: Tensor | None, chosen: Chosen) -> None:
    for layer, states in enumerate(chosen.states):
        if states:
            part.keep(opened, members, layer, index, dict(states))


def _nothing(part: Part, members: Members, grid: Grid) -> Decision:
    a, b = members.start, members.stop
    out = Decision(torch.zeros_like(grid.token[a:b], dtype=torch.bool), grid.token[a:b], grid.confidence[a:b])
    if members.traits.revises:
        out.replace, out.remask = torch.zeros_like(out.commit), torch.zeros_like(out.commit)
        out.done = out.commit.new_zeros(b - a)
    return out


def _put(out: Decision, at: Tensor, value: Decision) -> None:
    """Write the decision for some rows into that for all."""
    for name, each in vars(value).items():
        if each is None:
            continue
        have = getattr(out, name)
        if have is None:
            have = each.new_zeros((len(out.commit), *each.shape[1:]))
        elif name in ("token", "confidence"):
            have = have.clone()
        have[at] = each
        setattr(out, name, have)


def _decision_of(chosen: Chosen, members: Members) -> Decision:
    """A checked selection as a decision, with the surest candidate where a row commits none."""
    selection, step = chosen.selection, chosen.step
    commit = selection.commit
    if not (selection.waits or members.traits.drafts):
        some = commit.any(dim=1, keepdim=True)
        if not bool(some.all()):
            commit = commit | (surest(step.confidence, step.candidate) & ~some)
    own = selection.token is not None or selection.confidence is not None or chosen.adjusted
    model = step.confidence if step.probability is None or chosen.adjusted else step.probability
    out = Decision(
        commit,
        step.token if selection.token is None else selection.token.long(),
        model if selection.confidence is None else selection.confidence.float(),
        torch.ones(len(commit), dtype=torch.bool, device=commit.device) if own else None,
    )
    if members.traits.revises:
        assert selection.replace is not None and selection.remask is not None and selection.done is not None
        out.replace, out.remask = selection.replace, selection.remask
        left = ((step.candidate & ~commit) | selection.remask).any(dim=1)
        out.done = selection.done & ~left
    if selection.draft is not None:
        out.draft = selection.draft.long()
    return out


def _commit(part: Part, opened: Opened, decision: Decision, errors: dict[int, SamplerError]) -> list[StepEvent]:
    """Write what was decided to the canvases, find out where each row is now, and tell it, in one trip."""
    batch, slots, n = part.batch, part.slots, opened.numbers
    commit, replaced, remask = decision.commit, decision.replace, decision.remask
    blocks = [row.block for row in part.rows]
    if part.revising or part.drafting:
        commit, remask = _last_chance(opened, decision)
    if errors:
        commit, replaced, remask = (_without(each, errors) for each in (commit, replaced, remask))
    written = commit if replaced is None else commit | replaced
    row, column = written.nonzero(as_tuple=True)
    token, confidence = decision.token[row, column], decision.confidence[row, column]
    if decision.own is not None:
        _check_own(part, opened, decision, errors, row, token, confidence, commit)
        if errors:
            commit, replaced, remask = (_without(each, errors) for each in (commit, replaced, remask))
            written = commit if replaced is None else commit | replaced
            row, column = written.nonzero(as_tuple=True)
            token, confidence = decision.token[row, column], decision.confidence[row, column]
    position = opened.position[row, column]
    drafts = _write_drafts(part, opened, decision, commit, errors) if decision.draft is not None else None
    batch.tokens.view(-1)[part.flat_tokens[row] + position] = token
    batch.masked.view(-1)[part.flat_masks[row] + position] = False
    left = opened.masked & ~commit
    if remask is not None:
        left = left | remask
        again, at = remask.nonzero(as_tuple=True)
        place = opened.position[again, at]
        batch.tokens.view(-1)[part.flat_tokens[again] + place] = n[again, N.MASK_ID]
        batch.masked.view(-1)[part.flat_masks[again] + place] = True
    for i in part.keeping:
        part.rows[i].note_forward(opened.spans[i], blocks[i])
    filled = _note_ends(part, decision, row, position, token, left, opened)
    told_before = n[:, N.TOLD]
    moved = _settle(part, opened, left, errors)
    if filled:
        at = {part.rows[i].slot: i for i in range(len(part.rows))}
        moved[torch.tensor([at[slot] for slot, _ in filled], device=moved.device)] = True
    if bool(moved.any()):
        filled += enter(batch, slots[moved])
    return _tell(
        part, errors, told_before, filled, row, position, token, confidence, written, replaced, remask, opened, drafts
    )


def _without(which: Tensor | None, errors: Mapping[int, SamplerError]) -> Tensor | None:
    """Decisions but for those of rows that go no further."""
    if which is None:
        return None
    which = which.clone()
    which[list(errors)] = False
    return which


def _last_chance(opened: Opened, decision: Decision) -> tuple[Tensor, Tensor | None]:
    """Commits and new masks where a block that is revised or drafted may have had all forwards that it gets."""
    n = opened.numbers
    size = n[:, N.STOP] - n[:, N.START]
    bound = torch.where(n[:, N.REVISES] > 0, 2 * size, 0) + n[:, N.MOST]
    last = ((n[:, N.BLOCK_STEP] + 1 >= bound) & ((n[:, N.REVISES] > 0) | (n[:, N.DRAFTS] > 0)))[:, None]
    commit = torch.where(last, opened.candidate, decision.commit)
    remask = decision.remask
    if remask is not None:
        remask = remask & ~last
        assert decision.done is not None
        decision.done = decision.done | last[:, 0]
    return commit, remask


def _check_own(
    part: Part,
    opened: Opened,
    decision: Decision,
    errors: dict[int, SamplerError],
    row: Tensor,
    token: Tensor,
    confidence: Tensor,
    commit: Tensor,
) -> None:
    """Find rows whose rule would commit a token that cannot be, or says a confidence that is none."""
    assert decision.own is not None
    n = opened.numbers

    def mask_of(rows: Tensor) -> Tensor:
        return torch.where(n[rows, N.NOISE] > 0, -1, n[rows, N.MASK_ID])

    bad = check_told(token, confidence, n[row, N.VOCABULARY], mask_of(row)) & decision.own[row]
    wrong = row[bad]
    if decision.draft is not None:
        open_row, at = (opened.candidate & ~commit).nonzero(as_tuple=True)
        tokens = decision.token[open_row, at]
        bad = check_told(tokens, torch.zeros_like(tokens).float(), n[open_row, N.VOCABULARY], mask_of(open_row))
        wrong = torch.cat([wrong, open_row[bad & decision.own[open_row] & (n[open_row, N.DRAFTS] > 0)]])
    for i in wrong.unique().tolist():
        tokens_of = decision.token[i][commit[i] | (opened.candidate[i] if decision.draft is not None else False)]
        mask_id = part.rows[i].mask_id
        said = "a confidence is no probability"
        vocabulary = part.rows[i].vocabulary
        if bool((tokens_of < 0).any()) or (vocabulary is not None and bool((tokens_of >= vocabulary).any())):
            said = "a token that does not exist was selected"
        elif mask_id is not None and bool((tokens_of == mask_id).any()):
            said = "the mask token was selected"
        errors.setdefault(i, failure(_suspect(part, i), ContractError(said)))


def _write_drafts(
    part: Part, opened: Opened, decision: Decision, commit: Tensor, errors: Mapping[int, SamplerError]
) -> list[list[int]]:
    """Put drafts where candidates stay candidates; returns what would be committed there by now, by row."""
    assert decision.draft is not None
    drafting = opened.numbers[:, N.DRAFTS, None] > 0
    still = opened.candidate & ~commit & drafting
    if errors:
        still[list(errors)] = False
    row, column = still.nonzero(as_tuple=True)
    place = part.flat_tokens[row] + opened.position[row, column]
    part.batch.tokens.view(-1)[place] = decision.draft[row, column]
    tokens, counts = decision.token[row, column].tolist(), still.sum(dim=1).tolist()
    return _cut(tokens, counts)


def _note_ends(
    part: Part, decision: Decision, row: Tensor, position: Tensor, token: Tensor, left: Tensor, opened: Opened
) -> list[tuple[int, list[int]]]:
    """Note end-of-text tokens that were committed for good; returns what became padding."""
    if not part.revising:
        if part.ends == () or not _any_of(token, part.ends):
            return []
        return note_ends(part.batch, part.slots, row, position, token)
    n = opened.numbers
    plain = n[:, N.REVISES] == 0
    kept = plain[row]
    filled = note_ends(part.batch, part.slots, row[kept], position[kept], token[kept])
    assert decision.done is not None
    finished = ~plain & decision.done & ~(left & opened.block).any(dim=1)
    if bool(finished.any()):
        filled += close(part.batch, part.slots[finished])
    return filled


def _any_of(token: Tensor, ends: tuple[int, ...] | None) -> bool:
    if ends is None:
        return True
    found = token == ends[0]
    for end in ends[1:]:
        found = found | (token == end)
    return bool(found.any())


def _settle(part: Part, opened: Opened, left: Tensor, errors: Mapping[int, SamplerError]) -> Tensor:
    """Count the forward and note what is settled; returns rows that may have no mask left in their block."""
    batch, slots = part.batch, part.slots
    n = batch.numbers.index_select(0, slots)  # ends and closed blocks were noted there
    c = n.unbind(1)
    if part.region:
        left = left & opened.block
    some = left.any(dim=1)
    first = left.byte().argmax(dim=1)
    if not part.zero_based:
        first = first + c[N.START]
    c[N.STEPS].add_(1)
    c[N.BLOCK_STEP].add_(1)
    settled = torch.where(some, first, c[N.SETTLED])
    if part.revising:
        settled = torch.where(c[N.REVISES] > 0, settled.minimum(c[N.CLOSED]), settled)
    c[N.SETTLED].copy_(settled)
    if part.shifted:
        c[N.FIRST].copy_(some & (first == c[N.START]))
    c[N.TOLD].copy_(c[N.TOLD].maximum(told_stop(c)))
    if errors:  # rows that go no further stay as they were
        failed = list(errors)
        n[failed], some[failed] = opened.numbers[failed], True
    batch.numbers.index_copy_(0, slots, n)
    return ~some


def _tell(
    part: Part,
    errors: Mapping[int, SamplerError],
    told_before: Tensor,
    filled: list[tuple[int, list[int]]],
    row: Tensor,
    position: Tensor,
    token: Tensor,
    confidence: Tensor,
    written: Tensor,
    replaced: Tensor | None,
    remask: Tensor | None,
    opened: Opened,
    drafts: list[list[int]] | None,
) -> list[StepEvent]:
    """One trip to Python: what was committed, and where each row is now."""
    batch, slots = part.batch, part.slots
    n = batch.numbers[:, :CHANGING].index_select(0, slots)
    now = n.tolist()
    told = _newly_told(part, n[:, N.TOLD], told_before)
    positions, tokens, confidences = position.tolist(), token.tolist(), confidence.tolist()
    changed, masked = _by_row(replaced, opened), _by_row(remask, opened)
    padding: dict[int, list[int]] = {}
    for slot, places in filled:
        padding[slot] = padding.get(slot, []) + places
    events = []
    first = 0
    for i, (each, count, more, own) in enumerate(zip(part.rows, written.sum(dim=1).tolist(), told, now, strict=True)):
        each.show(own)
        stop = first + count
        event = StepEvent(
            each.forwards_of_steps(own[N.STEPS]), positions[first:stop], tokens[first:stop], confidences[first:stop]
        )
        first = stop
        if more:
            each.told += more
            event.text_tokens = each.text_tokens()[each.reported :]
            each.reported = len(each.told)
        event.settled = each.reported
        events.append(event)
        if padding:
            event.filled = padding.get(each.slot, [])
        if changed is not None:
            event.replaced = changed[i]
        if masked is not None:
            event.remasked = masked[i]
        if drafts is not None:
            event.draft = drafts[i]
    for i, error in errors.items():
        events[i] = StepEvent(error=error)
    return events


def _newly_told(part: Part, now: Tensor, before: Tensor) -> Sequence[list[int]]:
    """Tokens of each row that became settled text with this step."""
    grown = now - before
    counts = grown.tolist()
    if not (total := sum(counts)):
        return [[]] * len(counts)
    which = torch.repeat_interleave(part.flat_tokens + before - grown.cumsum(0) + grown, grown, output_size=total)
    tokens = part.batch.tokens.view(-1)[which + torch.arange(total, device=which.device)]
    return _cut(tokens.tolist(), counts)


def _by_row(which: Tensor | None, opened: Opened) -> list[list[int]] | None:
    if which is None:
        return None
    return _cut(opened.position[which].tolist(), which.sum(dim=1).tolist())


def _cut(values: list[int], counts: list[int]) -> list[list[int]]:
    """A list in pieces of these lengths."""
    found, first = [], 0
    for count in counts:
        found.append(values[first : first + count])
        first += count
    return found
