"""The one denoising loop's logic: canvases + prediction + samplers -> next canvases, finished or not.

Pure: it knows no model and no queue. The engine drives many generations at once through `ask` and `advance`; training
environments and evaluation hand `denoise` a `predict` callable.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samplers.base import Sampler, SamplerError, SamplerParams, Selection, Step, best
from samplers.cache import CacheMode, Feed, Memory, feed
from samplers.canvas import Canvas
from samplers.prediction import Prediction, Statistic, TokenChoice
from samplers.randomness import TOKENS, uniform

GREEDY = TokenChoice()


@dataclass(eq=False)
class Denoising:
    """One generation on its way from all masks to text.

    Attributes:
        canvas: what there is so far.
        sampler, params: the rule that chooses what to commit.
        choice: how a committed position's token is chosen.
        seed: the generation's random stream.
        end_ids: tokens that end the text. Empty: the whole region is denoised.
        fill_after_end: committing an end-of-text settles every masked position after it at once, as padding. Off,
            those positions are denoised like any other until everything before the end is settled.
        cache: what is kept from a block's first forward for those after it.
        forwards: forward passes that this generation took part in.
        block, block_step, block_masks: the active block, forwards spent on it, its masks when it became active.
        settled: length of the committed prefix of the generation region: what can no longer change.
    """

    canvas: Canvas
    sampler: Sampler
    params: SamplerParams
    choice: TokenChoice = GREEDY
    seed: int = 0
    end_ids: frozenset[int] = frozenset()
    fill_after_end: bool = True
    cache: CacheMode = CacheMode.NONE
    forwards: int = 0
    block: int = field(default=0, init=False)
    block_step: int = field(default=0, init=False)
    block_masks: int = field(default=0, init=False)
    settled: int = field(default=0, init=False)
    _memory: Memory = field(default_factory=Memory, init=False, repr=False)
    _candidates: Tensor = field(init=False, repr=False)
    end: int | None = field(default=None, init=False)
    """Position of the first committed end-of-text in the generation region."""

    def __post_init__(self) -> None:
        self.sampler.check(self.params, self.canvas.layout)
        self._enter_block()

    def _enter_block(self) -> None:
        """Make the first block with a mask the active one, and note what follows from the masks, once a step."""
        layout = self.canvas.layout
        self.settled = self.canvas.settled
        block = min(self.settled // layout.block_length, layout.blocks - 1)
        start = block * layout.block_length
        self._candidates = self.canvas.masked[start : start + layout.block_length].nonzero()[:, 0] + start
        if self.block_masks == 0 or block != self.block:
            self.block, self.block_step = block, 0
            self.block_masks = len(self._candidates)

    @property
    def finished(self) -> bool:
        """No mask is left, or everything up to and including an end-of-text is settled."""
        return self.settled == self.canvas.layout.gen_length or (self.end is not None and self.settled > self.end)

    @property
    def completion_tokens(self) -> int:
        """Settled tokens up to and including the first end-of-text: what counts as generated."""
        return self.settled if self.end is None else min(self.settled, self.end + 1)

    def text_tokens(self) -> list[int]:
        """The settled tokens before the end-of-text."""
        count = self.settled if self.end is None else min(self.settled, self.end)
        tokens: list[int] = self.canvas.generated[:count].tolist()
        return tokens

    def feed(self) -> Feed:
        """What the next forward computes of this canvas."""
        return feed(self.cache, self._memory, self.canvas.layout, self.block, self.block_step)

    def candidates(self) -> Tensor:
        """Masked positions of the active block, relative to the generation region."""
        return self._candidates

    def commit(self, positions: Tensor, tokens: Tensor) -> list[int]:
        """Fix positions to tokens; returns the positions after an end-of-text that this settles as padding."""
        self.canvas.generated[positions] = tokens
        self.canvas.masked[positions] = False
        ends = [p for p, t in zip(positions.tolist(), tokens.tolist(), strict=True) if t in self.end_ids]
        if ends:
            self.end = min(ends) if self.end is None else min(self.end, *ends)
        filled: list[int] = []
        if self.end is not None and self.fill_after_end:
            after = self.canvas.masked.clone()
            after[: self.end] = False
            filled = after.nonzero()[:, 0].tolist()
            self.canvas.generated[after] = self.canvas.generated[self.end]
            self.canvas.masked[after] = False
        self.forwards += 1
        self.block_step += 1
        self._enter_block()
        return filled


@dataclass(frozen=True)
class Query:
    """What a step needs to know: positions of canvases, and which statistics.

    Attributes:
        canvases: what the model sees, one row of the forward each.
        feeds: what it computes of each.
        row, position: int64 [n], the positions asked for: index into `canvases` and place on that canvas.
        statistics: wanted beside token and confidence.
        choices, uniform: how to choose each position's token, and a random number for it; None where all are greedy.
        top: how many of the largest probabilities are wanted.
    """

    canvases: list[Canvas]
    feeds: list[Feed]
    row: Tensor
    position: Tensor
    statistics: frozenset[Statistic]
    choices: list[TokenChoice] | None = None
    uniform: Tensor | None = None
    top: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one step did to one generation: positions relative to the generation region, or why it cannot go on."""

    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    error: SamplerError | None = None


Predict = Callable[[Query], Prediction]


def ask(rows: Sequence[Denoising]) -> Query:
    """The query of the next step of all these generations, none of them finished."""
    feeds = [row.feed() for row in rows]
    found = [
        _asked(row, feed) if row.sampler.region else row.candidates() for row, feed in zip(rows, feeds, strict=True)
    ]
    index = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(c) for c in found]))
    starts = torch.tensor([row.canvas.layout.prompt_length for row in rows])
    relative = torch.cat(found)
    choices = numbers = None
    if any(row.choice != GREEDY for row in rows):
        choices = [rows[i].choice for i in index.tolist()]
        seeds = torch.tensor([row.seed for row in rows])[index]
        forwards = torch.tensor([row.forwards for row in rows])[index]
        numbers = uniform(seeds, forwards, relative, TOKENS)
    wanted = frozenset[Statistic]().union(*(row.sampler.statistics for row in rows))
    top = max(row.sampler.top for row in rows)
    return Query([row.canvas for row in rows], feeds, index, relative + starts[index], wanted, choices, numbers, top)


def _asked(row: Denoising, feed: Feed) -> Tensor:
    """All positions of the generation region that the forward computes."""
    layout = row.canvas.layout
    first = max(0, feed.start - layout.prompt_length)
    return torch.arange(first, min(layout.gen_length, feed.stop - layout.prompt_length))


def advance(rows: Sequence[Denoising], query: Query, prediction: Prediction) -> list[Outcome]:
    """Let each sampler select among its rows' candidates, and commit. One outcome a row, in order.

    A row whose prediction is not finite, or whose sampler fails or breaks the contract, gets an error as its outcome
    and is left as it was; the others are not affected.
    """
    outcomes: list[Outcome | None] = [None] * len(rows)
    groups: dict[int, list[int]] = {}
    broken = set(query.row[~prediction.confidence.isfinite()].tolist())
    for i, row in enumerate(rows):
        if i in broken:
            outcomes[i] = Outcome(error=SamplerError("the model's output is not finite"))
        else:
            groups.setdefault(id(row.sampler), []).append(i)
    for members in groups.values():
        step = _step([rows[i] for i in members], members, query, prediction)
        for i, outcome in zip(members, _select(rows[members[0]].sampler, step), strict=True):
            outcomes[i] = outcome if isinstance(outcome, Outcome) else _commit(rows[i], step, members.index(i), outcome)
    return [outcome for outcome in outcomes if outcome is not None]


def _step(rows: list[Denoising], members: list[int], query: Query, prediction: Prediction) -> Step:
    """The part of a prediction that belongs to these rows, laid out on a grid of positions."""
    width = max(row.canvas.layout.gen_length for row in rows)
    local = torch.full((len(query.canvases),), -1)
    local[members] = torch.arange(len(members))
    line = local[query.row]
    mine = line >= 0
    starts = torch.tensor([row.canvas.layout.prompt_length for row in rows])
    line = line[mine]
    column = query.position[mine] - starts[line]

    def grid(values: Tensor, empty: float) -> Tensor:
        out = torch.full((len(rows), width, *values.shape[1:]), empty, dtype=values.dtype)
        out[line, column] = values[mine]
        return out

    candidate = torch.zeros(len(rows), width, dtype=torch.bool)
    masked = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        candidate[i, row.candidates()] = True
        masked[i, : row.canvas.layout.gen_length] = row.canvas.masked
    top = rows[0].sampler.top

    def counter(values: list[int]) -> Tensor:
        return torch.tensor(values)[:, None]

    return Step(
        candidate=candidate,
        masked=masked,
        token=grid(prediction.token, -1),
        confidence=grid(prediction.confidence, -torch.inf),
        extra={name: grid(values, torch.nan) for name, values in prediction.extra.items()},
        params=[row.params for row in rows],
        layouts=[row.canvas.layout for row in rows],
        seed=counter([row.seed for row in rows]),
        forward=counter([row.forwards for row in rows]),
        block=counter([row.block for row in rows]),
        block_step=counter([row.block_step for row in rows]),
        block_masks=counter([row.block_masks for row in rows]),
        top=None if prediction.top is None or not top else grid(prediction.top[:, :top], torch.nan),
    )


def _one(step: Step, i: int) -> Step:
    """A step of a single one of its rows."""
    tensors = {name: value[i : i + 1] for name, value in vars(step).items() if isinstance(value, Tensor)}
    extra = {name: value[i : i + 1] for name, value in step.extra.items()}
    return replace(step, **tensors, extra=extra, params=[step.params[i]], layouts=[step.layouts[i]])


def _select(sampler: Sampler, step: Step) -> list[Tensor | Outcome]:
    """Per row, what to commit, or the outcome of a failure."""
    try:
        return list(_checked(sampler, step))
    except Exception as error:
        if len(step.params) == 1:
            return [Outcome(error=SamplerError(f"sampler {sampler.name} failed: {type(error).__name__}: {error}"))]
    return [outcome for i in range(len(step.params)) for outcome in _select(sampler, _one(step, i))]


def _checked(sampler: Sampler, step: Step) -> Tensor:
    """The sampler's selection, held against the contract, with the surest candidate where a row commits none."""
    selection = sampler.select(step)
    commit = selection.commit
    if not isinstance(selection, Selection) or commit.dtype != torch.bool or commit.shape != step.candidate.shape:
        raise SamplerError("a selection must be bool and of the candidates' shape")
    if bool((commit & ~step.candidate).any()):
        raise SamplerError("a position that is no candidate was selected")
    if selection.waits:
        return commit
    none = ~commit.any(dim=1, keepdim=True)
    return commit | (best(step.confidence, step.candidate, torch.ones_like(step.forward)) & none)


def _commit(row: Denoising, step: Step, i: int, commit: Tensor) -> Outcome:
    positions = commit.nonzero()[:, 0]
    tokens = step.token[i, positions]
    confidences: list[float] = step.confidence[i, positions].tolist()
    filled = row.commit(positions, tokens)
    return Outcome(positions.tolist(), tokens.tolist(), confidences, filled)


def denoise(rows: Sequence[Denoising], predict: Predict) -> None:
    """Run these generations to their end together. Raises SamplerError if one of them cannot go on."""
    while running := [row for row in rows if not row.finished]:
        query = ask(running)
        for outcome in advance(running, query, predict(query)):
            if outcome.error is not None:
                raise outcome.error
