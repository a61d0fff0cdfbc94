"""The one denoising loop's logic: canvases + prediction + samplers -> next canvases, finished or not.

Pure: it knows no model and no queue. The engine drives many generations at once through `ask` and `advance`; training
environments and evaluation hand `denoise` a `predict` callable.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samplers.contract import SamplerError, Selection, Step
from samplers.forward.prediction import Prediction
from samplers.forward.query import Predict, Query
from samplers.forward.statistics import LogitBonus, Statistic, StatisticsRequest
from samplers.forward.token_choice import GREEDY
from samplers.loop.check import check_told, select
from samplers.loop.grid import Grid
from samplers.loop.guard import ContractError, failure, name_of
from samplers.loop.row import Row
from samplers.randomness import TOKENS, uniform

__all__ = ["Outcome", "advance", "ask", "denoise"]


@dataclass(frozen=True)
class Outcome:
    """What one step did to one generation, or why it cannot go on. Positions are relative to the generation region.

    Attributes:
        positions, tokens, confidences: what was committed; `replaced` are those of them that had another token before.
        filled: what became padding.
        remasked: what was masked again.
        draft: where a sampler drafts, what it would commit by now at each candidate that stays one, in order; none of
            these is settled, and the canvas holds them in part.
    """

    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    remasked: list[int] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    error: SamplerError | None = None


def ask(rows: Sequence[Row]) -> Query:
    """The query of the next step of all these generations, none of them finished.

    One whose sampler fails when it is asked is in the forward all the same, and `advance` says why it goes no further.
    """
    spans = [row.span() for row in rows]
    found = [row.asked(fed) for row, fed in zip(rows, spans, strict=True)]
    index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(c) for c in found]))
    starts = torch.tensor([row.canvas.layout.prompt_length for row in rows])
    relative = torch.cat(found)
    named, bonuses, failed = _asked_beside(rows, found)
    choices = numbers = None
    each = [row.token_choice for row in rows]
    if any(choice != GREEDY for choice in each):
        choices = [each[i] for i in index.tolist()]
        seeds = torch.tensor([row.seed for row in rows])[index]
        forwards = torch.tensor([row.forwards for row in rows])[index]
        numbers = uniform(seeds, forwards, relative, TOKENS)
    statistics = [row.statistics for row in rows]
    tops = [row.traits.top for row in rows]
    wanted = StatisticsRequest(
        statistics=frozenset[Statistic]().union(*statistics),
        only=_only(statistics, tops, index),
        choices=choices,
        uniform=numbers,
        top=max(tops),
        named=_side_by_side(named, found),
        bonus=LogitBonus.join(bonuses) if bonuses else None,
    )
    return Query([row.canvas for row in rows], spans, index, relative + starts[index], wanted, failed)


def _asked_beside(
    rows: Sequence[Row], asked: list[Tensor]
) -> tuple[list[Tensor | None], list[LogitBonus], dict[int, SamplerError]]:
    """What samplers name and add to logits, and the rows whose samplers failed, of which nothing is asked beside."""
    named: list[Tensor | None] = []
    bonuses: list[LogitBonus] = []
    failed: dict[int, SamplerError] = {}
    first = 0
    for i, (row, at) in enumerate(zip(rows, asked, strict=True)):
        tokens = added = None
        try:
            row.choose()
            tokens, added = row.named(at), row.bonus(at)
        except SamplerError as error:
            tokens, failed[i] = None, error
        named.append(tokens)
        if added is not None:
            bonuses.append(replace(added, index=added.index + first))
        first += len(at)
    return named, bonuses, failed


def _only(statistics: Sequence[frozenset[Statistic]], tops: Sequence[int], index: Tensor) -> dict[str, Tensor]:
    """Of everything that not all samplers want, the positions of those that do."""
    wishes: dict[str, list[bool]] = {
        name: [name in own for own in statistics] for name in frozenset[Statistic]().union(*statistics)
    }
    wishes["top"] = [top > 0 for top in tops]
    return {name: torch.tensor(wish)[index] for name, wish in wishes.items() if any(wish) and not all(wish)}


def _side_by_side(each: list[Tensor | None], asked: list[Tensor]) -> Tensor | None:
    """The tokens that samplers name, int64 [positions of all, as many as one names]."""
    if all(tokens is None for tokens in each):
        return None
    most = max(tokens.shape[1] for tokens in each if tokens is not None)
    out = torch.full((sum(map(len, asked)), most), -1)
    first = 0
    for tokens, at in zip(each, asked, strict=True):
        if tokens is not None:
            out[first : first + len(at), : tokens.shape[1]] = tokens
        first += len(at)
    return out


def advance(rows: Sequence[Row], query: Query, prediction: Prediction, may_wait: bool = False) -> list[Outcome]:
    """Let each sampler select among its rows' candidates, and commit. One outcome a row, in order.

    A row whose prediction is not finite, or whose sampler fails or breaks the contract, gets an error as its outcome
    and goes no further; the others are not affected.

    Args:
        may_wait: whether a sampler may commit nothing (`Selection.waits`), for drivers that bound the forwards.
    """
    outcomes: list[Outcome | None] = [None] * len(rows)
    groups: dict[tuple[int, int], list[int]] = {}
    broken = set(query.row[~prediction.confidence.isfinite()].tolist())
    for i, row in enumerate(rows):
        if i in query.failed:
            outcomes[i] = Outcome(error=query.failed[i])
        elif i in broken:
            outcomes[i] = Outcome(error=_not_finite(row, i, query))
        else:
            groups.setdefault((id(row.sampler), id(row.traits)), []).append(i)
    grid = Grid(rows, query.row, query.position, prediction)
    for members in groups.values():
        step, first = grid.step(members), rows[members[0]]
        selections = select(first.sampler, first.traits, step, may_wait)
        for line, (i, selection) in enumerate(zip(members, selections, strict=True)):
            outcomes[i] = _committed(rows[i], step, line, selection)
    return [outcome for outcome in outcomes if outcome is not None]


def _not_finite(row: Row, i: int, query: Query) -> SamplerError:
    bonus = query.wanted.bonus
    if bonus is not None and bool((query.row[bonus.index] == i).any()):
        return SamplerError(f"sampler {name_of(row.sampler)} failed: with its bonus the model's output is not finite")
    return SamplerError("the model's output is not finite")


def _committed(row: Row, step: Step, i: int, selection: Selection | SamplerError) -> Outcome:
    """What a selection did to a row, or the outcome of one that would have changed what is settled."""
    if isinstance(selection, SamplerError):
        return Outcome(error=selection)
    try:
        return _commit(row, step, i, selection)
    except ContractError as error:
        return Outcome(error=failure(row.sampler, error))


def _commit(row: Row, step: Step, i: int, selection: Selection) -> Outcome:
    traits = row.traits
    token = step.token[i] if selection.token is None else selection.token.long()
    model = step.confidence if step.probability is None else step.probability
    confidence = model[i] if selection.confidence is None else selection.confidence
    commit, changed, remask, done = selection.commit, selection.replace, selection.remask, selection.done
    if traits.revises:
        assert changed is not None and remask is not None and done is not None
        if row.last_chance:
            commit, remask, done = step.candidate[i], torch.zeros_like(remask), torch.ones_like(done)
        positions = (commit | changed).nonzero()[:, 0]
    else:
        commit = step.candidate[i] if traits.drafts and row.last_chance else commit
        positions = commit.nonzero()[:, 0]
    committed = token[positions]
    tokens, confidences = committed.tolist(), confidence[positions].tolist()
    open_tokens = token[step.candidate[i] & ~commit].tolist() if traits.drafts else []
    if selection.token is not None or selection.confidence is not None:
        own = [] if selection.token is None else tokens + open_tokens
        check_told(own, [] if selection.confidence is None else confidences, row.vocabulary, row.mask_id)
    replaced, remasked = [], []
    if changed is not None and remask is not None:
        masked = remask.nonzero()[:, 0]
        filled = row.revise(positions, committed, masked, bool(done))
        replaced, remasked = changed.nonzero()[:, 0].tolist(), masked.tolist()
    else:
        if selection.draft is not None:
            row.draft(selection.draft)
        filled = row.commit(positions, committed)
    if selection.states is not None:
        row.state = selection.states
    return Outcome(positions.tolist(), tokens, confidences, filled, replaced, remasked, open_tokens)


def denoise(rows: Sequence[Row], predict: Predict) -> None:
    """Run these generations to their end together. Raises SamplerError if one of them cannot go on."""
    while running := [row for row in rows if not row.finished]:
        query = ask(running)
        for outcome in advance(running, query, predict(query)):
            if outcome.error is not None:
                raise outcome.error
