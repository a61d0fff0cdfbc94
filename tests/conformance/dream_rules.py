"""What Dream's `diffusion_generate` and Fast-dLLM's do that no user of ours would want: their quirks, kept here.

Random numbers from one global stream, drawn for more positions than are decided; a batch that shares one count, which
may be nothing; ties that fall as torch.topk has it; a threshold with a bound on what it may commit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from samplers import CacheMode, Prediction, Selection, StateSpec, Statistic, Step, TokenChoice, TokenChoices
from samplers.forward.query import Query
from samplers.forward.statistics import CHOSEN, StatisticsRequest
from samplers.loop.numbers import N
from samplers.loop.row import Row
from samplers.ranking import surest
from samplers.rules.dream import Dream, DreamParams, shares
from samplers.rules.threshold import Threshold
from samplers.schedule import ScheduledParams
from server.engine import Backend
from tests.conformance.decoders import dream_filtered
from tests.conformance.models import query_logits
from tests.conformance.originals import without_ban

DEFAULTS: dict[str, Any] = {
    **{"alg": "origin", "steps": 512, "eps": 1e-3, "alg_temp": 0.0, "threshold": 0.9, "max_length": 20},
    # Its generation configuration is made from the model's, which says what transformers says of any model.
    **{"temperature": 1.0, "top_p": 1.0, "top_k": 50},
}
BOUNDED = "confidence_threshold"
INTEGER = StateSpec(0, torch.int64)


@dataclass(eq=False)
class ReleasedRow(Row):
    """A generation whose text may hold mask tokens."""

    def first_numbers(self) -> Tensor:
        numbers = super().first_numbers()
        numbers[N.MASK_ID] = -1
        return numbers


def with_masks(step: Step[Any], chosen: Selection, mask_id: int, limit: int | None) -> Selection:
    """A selection as the originals have it: what draws the mask token stays masked, and a block can be given up.

    Args:
        limit: forwards after which a block keeps what masks it has; None for no limit.
    """
    commit, token = chosen.commit & (step.token != mask_id), step.token
    if limit is not None:
        ends = (step.block_step + 1 >= limit) & step.candidate
        token = token.masked_fill(ends & ~commit, mask_id)
        commit = commit | ends
    return replace(chosen, commit=commit, token=token, waits=True)


@dataclass(eq=False)
class Draws:
    """A `predict` for our loop, and random numbers for its sampler, in the order in which these originals draw.

    Attributes:
        backend: our model.
        params: the original's keyword arguments, all of `DEFAULTS` among them.
        stream: its random numbers; None where it needs none.
        length, mask_id: of its canvases, padding included.
        limit: forwards after which a block keeps what masks it has; None for no limit.
        rows: all of its batch, in order.
        uniform: what decides whether a position is unmasked at random, [rows that run, longest region].
    """

    backend: Backend
    params: dict[str, Any]
    stream: torch.Generator | None
    length: int
    mask_id: int
    limit: int | None = None
    rows: Sequence[Row] = ()
    uniform: Tensor = field(init=False)
    _query: Query = field(init=False)

    def __call__(self, query: Query) -> Prediction:
        self._query = query
        temperature, top_p, top_k = (self.params[name] for name in ("temperature", "top_p", "top_k"))
        temperature = 0.0 if self.spent else temperature
        wide = self._widened() if temperature else query
        logits = self._logits(wide)
        drawn = torch.ones(len(logits), dtype=torch.bool)
        if self.params["alg"] == "origin" and not self.opens:
            drawn = self._draw_positions()
        if not temperature:
            drawn = torch.zeros_like(drawn)
        if temperature or (top_p < 1 and top_k):
            found = self._drawn(dream_filtered(logits, temperature, top_p, top_k), drawn)
        else:
            choices = TokenChoices.of([TokenChoice(0.0, top_p, top_k or 0)] * len(logits))
            found = without_ban(logits, StatisticsRequest(CHOSEN, choices=choices))
        place = query.row * self.length + query.position
        kept = torch.isin(wide.row * self.length + wide.position, place)
        extra = {name: values[kept] for name, values in found.extra.items()}
        return Prediction(found.token[kept], extra[Statistic.CHOSEN_CONFIDENCE], extra)

    @property
    def running(self) -> list[Row]:
        """The rows of the query."""
        return [row for row in self.rows if any(row.canvas is canvas for canvas in self._query.canvases)]

    @property
    def opens(self) -> bool:
        """Whether this forward is a block's first, which decides one position and fills the cache."""
        row = self.running[0]
        return row.cache is not CacheMode.NONE and row.block_step == 0

    @property
    def spent(self) -> bool:
        """Whether this forward is one too many, with which a block of Fast-dLLM's ends that still has masks."""
        row = self.running[0]
        if row.cache is CacheMode.NONE or self.params["alg"] == BOUNDED:
            return False
        return row.block_step >= self.params["steps"] // row.canvas.layout.blocks

    def _widened(self) -> Query:
        """The query with all positions that tokens are drawn for, whether they are used or not."""
        query, each = self._query, []
        for i, (row, feed) in enumerate(zip(self.running, query.spans, strict=True)):
            start = row.canvas.layout.prompt_length
            if self.opens:
                each.append(torch.arange(feed.start, feed.stop))
            elif row.cache is CacheMode.PREFIX and self.params["alg"] == BOUNDED:
                masked = row.canvas.masked.nonzero()[:, 0] + start
                each.append(masked[masked >= feed.start])
            else:
                each.append(query.position[query.row == i])
        rows = torch.arange(len(each)).repeat_interleave(torch.tensor([len(positions) for positions in each]))
        return replace(query, row=rows, position=torch.cat(each))

    def _logits(self, query: Query) -> Tensor:
        """What decides each position, [n, vocab]: the outputs that serve requests too."""
        return query_logits(self.backend, query)

    def _draw_positions(self) -> Tensor:
        """Which of the query's positions are unmasked at random, bool [n]."""
        query, (first, *_) = self._query, self.running
        starts = torch.tensor([row.canvas.layout.prompt_length for row in self.running])
        numbers = torch.rand(len(query.row), generator=self.stream)
        self.uniform = torch.ones(len(self.running), first.canvas.layout.gen_length)
        self.uniform[query.row, query.position - starts[query.row]] = numbers
        steps, s = self.params["steps"], first.block_step
        times = torch.linspace(1, self.params["eps"], steps + 1)
        return numbers < (1 - times[s + 1] / times[s] if s < steps - 1 else 1)

    def _drawn(self, p: Tensor, drawn: Tensor) -> Prediction:
        """Tokens of the `drawn` positions [n], and what these probabilities [n, vocab] say of all."""
        token = p.argmax(dim=-1)
        if drawn.any():
            chances = p[drawn] / p[drawn].sum(dim=-1, keepdim=True)
            token[drawn] = torch.multinomial(chances, 1, replacement=True, generator=self.stream)[:, 0]
        confidence, two = p.gather(1, token[:, None])[:, 0], p.topk(2, dim=-1).values
        extra = {
            Statistic.CHOSEN_CONFIDENCE: confidence,
            Statistic.CHOSEN_MARGIN: two[:, 0] - two[:, 1],
            Statistic.CHOSEN_ENTROPY: torch.special.entr(p).sum(dim=-1),
        }
        return Prediction(token, confidence, extra)

    def order(self) -> Tensor:
        """Random numbers that put the regions' positions in order, as torch.multinomial does, [rows that run, width].

        It divides probabilities by exponential numbers, and takes the largest quotients; our sampler says the same by
        uniform numbers.
        """
        width, columns, slots = self._places()
        numbers = torch.empty(len(self.rows), width).exponential_(generator=self.stream)
        out = torch.ones(len(self.running), self.running[0].canvas.layout.gen_length)
        out[:, columns] = numbers[[row in self.running for row in self.rows]][:, slots]
        return (-out.double()).exp()

    def surest(self, score: Tensor, candidate: Tensor, count: int) -> Tensor:
        """The best scores by torch.topk: which of equal ones those are depends on the row's length."""
        width, columns, slots = self._places()
        whole = torch.full((len(score), width), -torch.inf)
        whole[:, slots] = score.float().masked_fill(~candidate, -torch.inf)[:, columns]
        chosen = torch.zeros_like(whole, dtype=torch.bool).scatter(1, whole.topk(count).indices, True)
        out = torch.zeros_like(candidate)
        out[:, columns] = chosen[:, slots]
        return out & candidate

    def _places(self) -> tuple[int, slice, slice]:
        """Length of what the original looks at in this forward, and which of the regions' positions are where in it."""
        feed, layout = self._query.spans[0], self._query.canvases[0].layout
        if feed.start == 0:
            return self.length, slice(0, layout.gen_length), slice(self.length - layout.gen_length, self.length)
        first, width = feed.start - layout.prompt_length, feed.stop - feed.start
        return width, slice(first, first + width), slice(0, width)


class ReleasedDream(Dream):
    """Dream's rules as its code has them: the mean of a batch counts, and a forward may commit nothing."""

    sees_region = True

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def select(self, step: Step[DreamParams]) -> Selection:  # type: ignore[override]
        if self._draws.opens:
            chosen = Selection(step.candidate)
        elif self._draws.spent:
            chosen = Selection(torch.zeros_like(step.candidate))
        else:
            chosen = super().select(step)
        return with_masks(step, chosen, self._draws.mask_id, self._draws.limit)

    def count(self, step: Step[DreamParams], share: Tensor) -> Tensor:
        mean = step.candidate.sum() / len(self._draws.rows)
        return (mean * share).long()

    def surest(self, score: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
        if self._draws.params["alg_temp"]:
            return super().surest(score, candidate, count)  # no two are equal
        return self._draws.surest(score, candidate, int(count.max()))

    def numbers(self, step: Step[DreamParams]) -> Tensor:
        params, count = step.params[0], self.count(step, shares(step))
        if params.alg == "origin":
            return self._draws.uniform
        return self._draws.order() if params.alg_temp > 0 and bool(count.any()) else step.uniform()


class BlockThreshold(Threshold):
    """Fast-dLLM's for Dream with a cache."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def select(self, step: Step[ScheduledParams]) -> Selection:
        commit = super().select(step).commit | surest(step.confidence, step.candidate)
        return with_masks(step, Selection(commit), self._draws.mask_id, None)


class BoundedThreshold(Threshold):
    """Fast-dLLM's for Dream without a cache: no step commits more than its share and what others left of theirs.

    After the last step there are more, one for each that commits too little.
    """

    sees_region = True
    # What a step may commit beside what those before left, and the steps there are: 0 before the first one.
    state: Mapping[str, StateSpec] = {"number": INTEGER, "left": INTEGER, "steps": INTEGER}

    class Params(ScheduledParams):
        threshold: float

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def select(self, step: Step[ScheduledParams]) -> Selection:
        number, left, steps = (int(step.state[name]) for name in ("number", "left", "steps"))
        if not steps:
            steps = int(step.param("steps"))
            number = int(step.candidate.sum()) // steps
        sure = step.confidence >= step.param("threshold")
        commit = self._draws.surest(step.confidence, step.candidate, number + left) & sure
        if not commit.any():
            commit = surest(step.confidence, step.candidate)
        left += number - int(commit.sum())
        last = left > 0 and int(step.block_step) == steps - 1
        state = {"number": 0 if last else number, "left": left, "steps": steps + last}
        chosen = Selection(commit, state={name: torch.tensor([[value]]) for name, value in state.items()})
        return with_masks(step, chosen, self._draws.mask_id, None)
