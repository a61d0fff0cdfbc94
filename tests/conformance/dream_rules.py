"""What Dream's `diffusion_generate` and Fast-dLLM's do that no user of ours would want: their quirks, kept here.

Random numbers from one global stream, drawn for more positions than are decided; a batch that shares one count, which
may be nothing; a threshold with a bound on what it may commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers import CacheMode, Prediction, SamplerParams, Selection, Statistic, Step
from samplers.base import best
from samplers.denoising import Denoising, Query
from samplers.dream import Dream, share_at
from samplers.schedule import ScheduledParams
from samplers.threshold import Threshold
from server.engine.torch_backend import TorchBackend
from tests.conformance.decoders import filtered
from tests.conformance.forwards import fed_logits


class Reopening(Denoising):
    """A generation in which the mask token can be drawn, as in the originals: the position then stays masked."""

    def _write(self, positions: Tensor, tokens: Tensor) -> None:
        super()._write(positions, tokens)
        self.canvas.masked[positions] = tokens == self._mask_id


@dataclass(eq=False)
class Draws:
    """A `predict` for our loop, and random numbers for its sampler, in the order in which these originals draw.

    Attributes:
        backend: our model.
        params: the original's keyword arguments.
        stream: its random numbers; None where it needs none.
        length: of its canvases, padding included.
        rows: all of its batch, in order.
    """

    backend: TorchBackend
    params: dict[str, Any]
    stream: torch.Generator | None
    length: int
    rows: Sequence[Denoising] = ()
    uniform: Tensor = field(default_factory=lambda: torch.empty(0))
    """What decides whether a position is unmasked at random, [rows that run, longest region]."""
    _query: Query | None = None

    @property
    def temperature(self) -> float:
        return self.params.get("temperature") or 0.0

    @property
    def shaped(self) -> bool:
        """Whether tokens are not simply the likeliest ones, or are judged by a distribution that was filtered."""
        return self.temperature > 0 or self._top_p < 1 or self.params.get("top_k", 50) is not None

    @property
    def _top_p(self) -> float:
        top_p: float | None = self.params.get("top_p")
        return 1.0 if top_p is None else top_p

    def __call__(self, query: Query) -> Prediction:
        self._query = query
        running = self.running()
        asked = query.row, query.position - running[0].canvas.layout.prompt_length
        if len({row.canvas.layout.prompt_length for row in running}) > 1:
            asked = query.row, query.position - torch.tensor([r.canvas.layout.prompt_length for r in running])[query.row]
        if self.params.get("alg", "origin") == "origin":
            self.uniform = torch.ones(len(running), running[0].canvas.layout.gen_length)
            self.uniform[asked] = torch.rand(len(query.row), generator=self.stream)
        if not self.shaped:
            return self.backend.predict(query)
        drawn = self._drawn(query, running)
        starts = torch.tensor([feed.start for feed in query.feeds])
        at = query.row, query.position - starts[query.row]
        return Prediction(drawn.token[at], drawn.confidence[at], {name: v[at] for name, v in drawn.extra.items()})

    def running(self) -> list[Denoising]:
        """The rows of the query."""
        assert self._query is not None
        return [row for row in self.rows if any(row.canvas is canvas for canvas in self._query.canvases)]

    def _drawn(self, query: Query, running: Sequence[Denoising]) -> Prediction:
        """Tokens and what is said of them, [rows, fed]."""
        raw = fed_logits(self.backend, query.canvases, query.feeds)
        # What is fed is shifted within itself: its first position is decided by its own output.
        logits = torch.cat([raw[:, :1], raw[:, :-1]], dim=1)
        p = dream_distribution(logits.flatten(0, 1), self.temperature, self._top_p, self.params.get("top_k", 50))
        p = p.view(logits.shape)
        token = p.argmax(dim=-1)
        if self.temperature > 0:
            where = self._drawn_where(query, running, logits.shape[1])
            if where.any():
                chances = p[where] / p[where].sum(dim=-1, keepdim=True)
                token[where] = torch.multinomial(chances, 1, True, generator=self.stream)[:, 0]
        two = p.topk(2, dim=-1).values
        extra = {
            Statistic.CHOSEN_CONFIDENCE: p.gather(-1, token[..., None])[..., 0],
            Statistic.CHOSEN_MARGIN: two[..., 0] - two[..., 1],
            Statistic.CHOSEN_ENTROPY: -(p * (p + 1e-10).log()).sum(dim=-1),
        }
        return Prediction(token, extra[Statistic.CHOSEN_CONFIDENCE], extra)

    def _drawn_where(self, query: Query, running: Sequence[Denoising], fed: int) -> Tensor:
        """Of what is fed, bool [rows, fed], the positions that a token is drawn for, whether it is used or not."""
        where = torch.zeros(len(running), fed, dtype=torch.bool)
        starts = torch.tensor([feed.start for feed in query.feeds])
        at = query.row, query.position - starts[query.row]
        if opens(running[0]):
            return ~where
        alg = self.params.get("alg", "origin")
        if alg == "origin":
            share = share_at(running[0].params, running[0].canvas.layout, 0, running[0].block_step)  # type: ignore[arg-type]
            firsts = torch.tensor([row.canvas.layout.prompt_length for row in running])[query.row]
            where[at] = self.uniform[query.row, query.position - firsts] < share
        elif alg == "confidence_threshold" and running[0].cache is CacheMode.PREFIX:
            for i, (row, feed) in enumerate(zip(running, query.feeds, strict=True)):
                where[i] = row.canvas.masked[feed.start - row.canvas.layout.prompt_length :]
        else:
            where[at] = True
        return where

    def order(self) -> Tensor:
        """Random numbers that put the regions' positions in order, as torch.multinomial does, [rows that run, width].

        It divides probabilities by exponential numbers, and takes the largest quotients; our sampler says the same by
        uniform numbers.
        """
        width, columns, slots = self._places()
        numbers = torch.empty(len(self.rows), width).exponential_(generator=self.stream)
        running = self.running()
        out = torch.ones(len(running), running[0].canvas.layout.gen_length)
        out[:, columns] = numbers[[row in running for row in self.rows]][:, slots]
        return (-out.double()).exp()

    def surest(self, score: Tensor, candidate: Tensor, count: int) -> Tensor:
        """The best scores by torch.topk: among equals it takes what its algorithm happens to, given the row's length."""
        width, columns, slots = self._places()
        whole = torch.full((len(score), width), -torch.inf)
        whole[:, slots] = score.float().masked_fill(~candidate, -torch.inf)[:, columns]
        chosen = torch.zeros_like(whole, dtype=torch.bool).scatter(1, whole.topk(count).indices, True)
        out = torch.zeros_like(candidate)
        out[:, columns] = chosen[:, slots]
        return out & candidate

    def _places(self) -> tuple[int, slice, slice]:
        """Length of what the original looks at in this forward, and which of the regions' positions are where in it."""
        assert self._query is not None
        feed, layout = self._query.feeds[0], self._query.canvases[0].layout
        if feed.start == 0:
            return self.length, slice(0, layout.gen_length), slice(self.length - layout.gen_length, self.length)
        first, width = feed.start - layout.prompt_length, feed.stop - feed.start
        return width, slice(first, first + width), slice(0, width)


def opens(row: Denoising) -> bool:
    """Whether its next forward is a block's first, which decides one position and fills the cache."""
    return row.cache is not CacheMode.NONE and row.block_step == 0


class ReleasedDream(Dream):
    """Dream's rules as its code has them: the mean of a batch counts, and a forward may commit nothing."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def select(self, step: Step) -> Selection:
        if opens(self._draws.running()[0]):
            return Selection(step.candidate, waits=True)
        return replace(super().select(step), waits=True)

    def count(self, step: Step, share: Tensor) -> Tensor:
        mean = step.candidate.sum() / len(self._draws.rows)
        return (mean * share).long()

    def surest(self, score: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
        if self._draws.params.get("alg_temp"):
            return super().surest(score, candidate, count)  # no two are equal
        return self._draws.surest(score, candidate, int(count.max()))

    def numbers(self, step: Step, count: Tensor) -> Tensor:
        params = step.params[0]
        assert isinstance(params, Dream.Params)
        if params.alg == "origin":
            return self._draws.uniform
        return self._draws.order() if params.alg_temp > 0 and bool(count.any()) else step.uniform()


@dataclass(frozen=True)
class Turn:
    """Step `at` of `steps`, which may commit `number` and what was `left` by those before."""

    number: int
    left: int
    steps: int
    at: int = 0


class BoundedThreshold(Threshold):
    """Fast-dLLM's for Dream without a cache: no step commits more than its share and what others left of theirs.

    After the last step there are more, one for each that commits too little.
    """

    class Params(ScheduledParams):
        threshold: float

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def start(self, params: SamplerParams) -> Turn | None:
        return None

    def select(self, step: Step) -> Selection:
        (params,) = step.params
        assert isinstance(params, BoundedThreshold.Params)
        turn = step.states[0]
        if turn is None:
            assert params.steps is not None
            turn = Turn(int(step.candidate.sum()) // params.steps, 0, params.steps)
        most = turn.number + turn.left
        seen = self._draws.surest(step.confidence, step.candidate, most)
        commit = seen & (step.confidence >= params.threshold)
        commit |= best(step.confidence, step.candidate, torch.ones(1, 1))
        left = most - int(commit.sum())
        last = left > 0 and turn.at == turn.steps - 1
        turn = Turn(0 if last else turn.number, left, turn.steps + last, turn.at + 1)
        return Selection(commit, waits=True, states=[turn])


def dream_distribution(logits: Tensor, temperature: float, top_p: float, top_k: int | None) -> Tensor:
    """Probabilities [n, vocab]: temperature, then top-p, then top-k. A temperature of 0 counts as 1."""
    shape = partial(filtered, logits, temperature or 1.0)
    p = shape(0, top_p)
    if not top_k:
        return p
    p = p * (shape(top_k, 1.0) > 0)
    return p / p.sum(dim=-1, keepdim=True)
