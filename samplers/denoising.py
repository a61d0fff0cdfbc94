"""The one denoising loop's logic: canvases + prediction + samplers -> next canvases, finished or not.

Pure: it knows no model and no queue. The engine drives many generations at once through `ask` and `advance`; training
environments and evaluation hand `denoise` a `predict` callable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from samplers.base import Sampler, SamplerError, Selection, Step, best
from samplers.cache import Feed
from samplers.canvas import Canvas
from samplers.generation import GREEDY, Denoising
from samplers.grid import Grid
from samplers.prediction import NOTHING, Bonus, Prediction, Statistic, Wanted
from samplers.randomness import TOKENS, uniform

__all__ = ["GREEDY", "Denoising", "Outcome", "Predict", "Query", "advance", "ask", "denoise"]


@dataclass(frozen=True)
class Query:
    """What a step needs to know: positions of canvases, and what of them.

    Attributes:
        canvases: what the model sees, one row of the forward each.
        feeds: what it computes of each.
        row, position: int64 [n], the positions asked for: index into `canvases` and place on that canvas.
        wanted: what to say of each position.
    """

    canvases: list[Canvas]
    feeds: list[Feed]
    row: Tensor
    position: Tensor
    wanted: Wanted = NOTHING

    def one(self, i: int) -> "Query":
        """What it asks of a single one of its canvases; `row` ascends."""
        start, stop = torch.searchsorted(self.row, torch.tensor([i, i + 1])).tolist()
        row, position = torch.zeros(stop - start, dtype=torch.int64), self.position[start:stop]
        return Query([self.canvases[i]], [self.feeds[i]], row, position, self.wanted.part(start, stop))


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


Predict = Callable[[Query], Prediction]
T = TypeVar("T")


def ask(rows: Sequence[Denoising]) -> Query:
    """The query of the next step of all these generations, none of them finished.

    Raises SamplerError if what a sampler asks for beside its statistics cannot be told.
    """
    feeds = [row.feed() for row in rows]
    found = [row.asked(fed) for row, fed in zip(rows, feeds, strict=True)]
    index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(c) for c in found]))
    starts = torch.tensor([row.canvas.layout.prompt_length for row in rows])
    relative = torch.cat(found)
    choices = numbers = None
    each = [row.token_choice for row in rows]
    if any(choice != GREEDY for choice in each):
        choices = [each[i] for i in index.tolist()]
        seeds = torch.tensor([row.seed for row in rows])[index]
        forwards = torch.tensor([row.forwards for row in rows])[index]
        numbers = uniform(seeds, forwards, relative, TOKENS)
    wanted = Wanted(
        statistics=frozenset[Statistic]().union(*(row.statistics for row in rows)),
        only=_only(rows, index),
        choices=choices,
        uniform=numbers,
        top=max(row.sampler.top for row in rows),
        named=_named(rows, found),
        bonus=_bonus(rows, found),
    )
    return Query([row.canvas for row in rows], feeds, index, relative + starts[index], wanted)


def _only(rows: Sequence[Denoising], index: Tensor) -> dict[str, Tensor]:
    """Of everything that not all samplers want, the positions of those that do."""
    wishes: dict[str, list[bool]] = {
        name: [name in row.statistics for row in rows]
        for name in frozenset[Statistic]().union(*(row.statistics for row in rows))
    }
    wishes["top"] = [row.sampler.top > 0 for row in rows]
    return {name: torch.tensor(wish)[index] for name, wish in wishes.items() if any(wish) and not all(wish)}


def _told(sampler: Sampler, hook: Callable[..., T], *arguments: Any) -> T:
    """What one of a sampler's methods says."""
    try:
        return hook(*arguments)
    except BaseException as error:
        raise _failure(sampler, error) from error


def _named(rows: Sequence[Denoising], asked: list[Tensor]) -> Tensor | None:
    """The tokens that samplers name, side by side."""
    each = [_told(row.sampler, row.sampler.name_tokens, row.state, at) for row, at in zip(rows, asked, strict=True)]
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


def _bonus(rows: Sequence[Denoising], asked: list[Tensor]) -> Bonus | None:
    """What samplers add to the logits."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    first = 0
    for row, at in zip(rows, asked, strict=True):
        places = at + row.canvas.layout.prompt_length
        if (added := _told(row.sampler, row.sampler.bonus, row.params, row.canvas.tokens, places)) is not None:
            found.append((added[0] + first, added[1], added[2]))
        first += len(at)
    return Bonus(*(torch.cat(each) for each in zip(*found, strict=True))) if found else None


def advance(rows: Sequence[Denoising], query: Query, prediction: Prediction) -> list[Outcome]:
    """Let each sampler select among its rows' candidates, and commit. One outcome a row, in order.

    A row whose prediction is not finite, or whose sampler fails or breaks the contract, gets an error as its outcome
    and goes no further; the others are not affected.
    """
    outcomes: list[Outcome | None] = [None] * len(rows)
    groups: dict[int, list[int]] = {}
    broken = set(query.row[~prediction.confidence.isfinite()].tolist())
    for i, row in enumerate(rows):
        if i in broken:
            outcomes[i] = Outcome(error=SamplerError("the model's output is not finite"))
        else:
            groups.setdefault(id(row.sampler), []).append(i)
    grid = Grid(rows, query.row, query.position, prediction)
    for members in groups.values():
        step = grid.step(members)
        for line, outcome in enumerate(_select(rows[members[0]].sampler, step)):
            i = members[line]
            outcomes[i] = outcome if isinstance(outcome, Outcome) else _committed(rows[i], step, line, outcome)
    return [outcome for outcome in outcomes if outcome is not None]


def _one(step: Step, i: int) -> Step:
    """A step of a single one of its rows."""
    whole = (name for name, value in vars(step).items() if value is not None and name != "extra")
    parts: dict[str, Any] = {name: getattr(step, name)[i : i + 1] for name in whole}
    return replace(step, **parts, extra={name: value[i : i + 1] for name, value in step.extra.items()})


def _failure(sampler: Sampler, error: BaseException) -> SamplerError:
    """The error of a generation whose sampler raised; its cause tells a log where in the sampler that was.

    A sampler that exits, or whose native code panics, fails its own generation too. Raises what a user's Ctrl-C raises.
    """
    if isinstance(error, KeyboardInterrupt):
        raise error
    failure = SamplerError(f"sampler {sampler.name} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _select(sampler: Sampler, step: Step) -> Sequence[Selection | Outcome]:
    """Per row, what to do, or the outcome of a failure."""
    try:
        return _rows_of(_checked(sampler, step))
    except BaseException as error:
        failure = _failure(sampler, error)
        if len(step.params) == 1:
            return [Outcome(error=failure)]
    return [outcome for i in range(len(step.params)) for outcome in _select(sampler, _one(step, i))]


def _rows_of(selection: Selection) -> list[Selection]:
    """A selection row by row."""
    parts = {name: value for name, value in vars(selection).items() if value is not None and name != "waits"}
    return [
        replace(selection, **{name: value[i] for name, value in parts.items()}) for i in range(len(selection.commit))
    ]


def _checked(sampler: Sampler, step: Step) -> Selection:
    """The sampler's selection, held against the contract, with the surest candidate where a row commits none."""
    # A copy: what may be committed is not for the sampler to change.
    selection = sampler.select(replace(step, candidate=step.candidate.clone()))
    commit = selection.commit
    if not isinstance(selection, Selection) or commit.dtype != torch.bool or commit.shape != step.candidate.shape:
        raise SamplerError("a selection must be bool and of the candidates' shape")
    if bool((commit & ~step.candidate).any()):
        raise SamplerError("a position that is no candidate was selected")
    if bool((step.candidate & (step.confidence == -torch.inf)).any()):
        raise SamplerError("the forward pass said nothing of a candidate")
    if sampler.revises:
        return _checked_revision(selection, step)
    if not (selection.replace is selection.remask is selection.done is None):
        raise SamplerError("this sampler does not say that it revises")
    if sampler.drafts:
        return _checked_draft(selection, step)
    if selection.draft is not None:
        raise SamplerError("this sampler does not say that it drafts")
    if selection.waits:
        return selection
    return replace(selection, commit=_at_least_one(commit, step))


def _at_least_one(commit: Tensor, step: Step) -> Tensor:
    none = ~commit.any(dim=1, keepdim=True)
    return commit | (best(step.confidence, step.candidate, torch.ones_like(step.forward)) & none)


def _checked_draft(selection: Selection, step: Step) -> Selection:
    """A draft of the candidates is there, and of tokens that there are."""
    draft = selection.draft
    if draft is None or draft.dtype != torch.int64 or draft.shape != step.candidate.shape:
        raise SamplerError("a sampler that drafts must say what the candidates hold, as token ids of their shape")
    sizes = torch.tensor([layout.scheme.noise or 0 for layout in step.layouts])[:, None]
    if bool((((draft < 0) | (draft >= sizes)) & step.candidate).any()):
        raise SamplerError("a token that does not exist was drafted")
    return selection


def _checked_revision(selection: Selection, step: Step) -> Selection:
    """Replacements and new masks stay within what was committed of the active block, and outside what was given."""
    nothing = torch.zeros_like(selection.commit)
    changed = selection.replace if selection.replace is not None else nothing
    masked = selection.remask if selection.remask is not None else nothing
    may_change = (step.confidence > -torch.inf) & ~step.masked
    assert step.given is not None
    if bool(((changed | masked) & ~(may_change & ~step.given)).any()) or bool((changed & masked).any()):
        raise SamplerError("a position that cannot be revised was selected")
    if selection.done is None:
        raise SamplerError("a sampler that revises must say which blocks are done")
    commit = _at_least_one(selection.commit, step)
    done = selection.done & ~((step.candidate & ~commit) | masked).any(dim=1)
    return replace(selection, commit=commit, replace=changed, remask=masked, done=done)


def _committed(row: Denoising, step: Step, i: int, selection: Selection) -> Outcome:
    """What a selection did to a row, or the outcome of one that would have changed what is settled."""
    try:
        return _commit(row, step, i, selection)
    except SamplerError as error:
        return Outcome(error=SamplerError(f"sampler {row.sampler.name} failed: {error}"))
    except BaseException as error:
        return Outcome(error=_failure(row.sampler, error))


def _commit(row: Denoising, step: Step, i: int, selection: Selection) -> Outcome:
    token = step.token[i] if selection.token is None else selection.token
    model = step.confidence if step.probability is None else step.probability
    confidence = model[i] if selection.confidence is None else selection.confidence
    if selection.states is not None:
        row.state = selection.states
    if not row.sampler.revises:
        if selection.draft is not None:
            row.draft(selection.draft)
            selection = replace(selection, commit=step.candidate[i]) if row.last_chance else selection
        positions = selection.commit.nonzero()[:, 0]
        said = token[step.candidate[i] & ~selection.commit].tolist() if row.sampler.drafts else []
        filled = row.commit(positions, token[positions])
        return Outcome(
            positions.tolist(), token[positions].tolist(), confidence[positions].tolist(), filled, draft=said
        )
    commit, changed, remask, done = selection.commit, selection.replace, selection.remask, selection.done
    assert changed is not None and remask is not None and done is not None
    if row.last_chance:
        commit, remask, done = step.candidate[i], torch.zeros_like(remask), torch.ones_like(done)
    positions, masked = (commit | changed).nonzero()[:, 0], remask.nonzero()[:, 0]
    filled = row.revise(positions, token[positions], masked, bool(done))
    replaced = changed.nonzero()[:, 0].tolist()
    return Outcome(
        positions.tolist(), token[positions].tolist(), confidence[positions].tolist(), filled, replaced, masked.tolist()
    )


def denoise(rows: Sequence[Denoising], predict: Predict) -> None:
    """Run these generations to their end together. Raises SamplerError if one of them cannot go on."""
    while running := [row for row in rows if not row.finished]:
        query = ask(running)
        for outcome in advance(running, query, predict(query)):
            if outcome.error is not None:
                raise outcome.error
