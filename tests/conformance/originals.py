"""What the originals do between logits and selection that no user of ours would want: their quirks, kept here.

LLaDA's `generate.py` and Fast-dLLM's: random numbers from one global stream of the shape of all logits, confidences
replaced by random numbers, and special tokens forced out of tokens or confidences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samplers import CacheMode, Selection, Statistic, Step
from samplers.canvas import Canvas
from samplers.forward.prediction import Prediction
from samplers.forward.query import Query
from samplers.forward.span import ForwardSpan
from samplers.forward.statistics import NOTHING, StatisticsRequest
from samplers.forward.summary import summarise
from samplers.modifiers.credit import CreditThreshold
from samplers.rules.entropy import Entropy
from samplers.rules.factor import Factor
from samplers.rules.threshold import Threshold
from samplers.schedule import passing_or_best

Logits = Callable[[Sequence[Canvas], Sequence[ForwardSpan]], Tensor]
"""Canvases, and what to compute of each, to logits [rows, fed, vocab]; all feed equally many positions."""


def gumbel(logits: Tensor, temperature: float, stream: torch.Generator | None) -> Tensor:
    """`add_gumbel_noise`: float64, in the exponential domain, one number per entry of all logits."""
    if temperature == 0:
        return logits
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=stream)
    return logits.double().exp() / (-noise.log()) ** temperature


def without_ban(logits: Tensor, wanted: StatisticsRequest = NOTHING) -> Prediction:
    """Our statistics, with a token that does not exist in the mask token's place.

    The originals let the mask token win; ours never do.
    """
    extended = torch.cat([logits, logits.new_full((len(logits), 1), -torch.inf)], dim=-1)
    return summarise(extended, logits.shape[-1], wanted)


def stream_of(seed: int | None) -> torch.Generator | None:
    """The stream that `torch.manual_seed(seed)` starts."""
    return None if seed is None else torch.Generator().manual_seed(seed)


class InferThreshold(Threshold):
    """dInfer's: near-ties of the surest go too, the mask token is no choice, and a call may commit nothing."""

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id

    def select(self, step: Step) -> Selection:
        return near_ties(step, step.token, step.confidence, self.mask_id)


class InferCredit(CreditThreshold):
    """dInfer's, by the same threshold."""

    def __init__(self, mask_id: int) -> None:
        self.mask_id = mask_id

    def select(self, step: Step) -> Selection:
        ours = super().select(step)
        assert ours.token is not None and ours.confidence is not None
        commit = near_ties(step, ours.token, ours.confidence, self.mask_id).commit
        return replace(ours, commit=commit, waits=True)


def near_ties(step: Step, token: Tensor, confidence: Tensor, mask_id: int) -> Selection:
    """What reaches the threshold, or is as sure as the surest but for 1e-5."""
    allowed = step.candidate & (token != mask_id)
    confidence = confidence.masked_fill(~allowed, -torch.inf)
    bound = torch.minimum(step.param("threshold"), confidence.amax(dim=1, keepdim=True) - 1e-5)
    return Selection(allowed & (confidence >= bound), waits=True)


class MostUncertain(Entropy):
    """dLLM-RL's `neg_entropy` for LLaDA: the sign is lost on the way, so that what is least sure goes first."""

    def select(self, step: Step) -> Selection:
        return passing_or_best(step, step.extra[Statistic.ENTROPY], -step.param("threshold", none=0))


class ReleasedFactor(Factor):
    """`get_transfer_index_dynamic`: a scan that ends at the last candidate takes it, whether it passed or failed."""

    def select(self, step: Step) -> Selection:
        commit = super().select(step).commit
        count, candidates = commit.sum(dim=1, keepdim=True), step.candidate.sum(dim=1, keepdim=True)
        return Selection(torch.where(count == candidates - 1, step.candidate, commit))


@dataclass
class Original:
    """A `predict` for our loop that chooses tokens and confidences as these originals do.

    Attributes:
        logits, vocabulary: our model.
        eos_id, eot_id: special tokens.
        params: the original's keyword arguments.
        stream: its random numbers; None where it needs none.
        draw_type: of the numbers that stand in for confidences when positions are chosen at random.
        cache: of Fast-dLLM's variants.
        feeds_twice: whether a block that its first forward has finished is still fed a second time, for nothing.
    """

    logits: Logits
    vocabulary: int
    eos_id: int
    eot_id: int
    params: dict[str, Any]
    stream: torch.Generator | None = None
    draw_type: torch.dtype = torch.float32
    cache: CacheMode = CacheMode.NONE
    feeds_twice: bool = False
    _first_of: Query | None = None

    def __call__(self, query: Query) -> Prediction:
        if self.feeds_twice and query.spans[0].start == 0:
            if self._first_of is not None:
                self._waste(self._first_of)
            self._first_of = query
        elif self.feeds_twice:
            self._first_of = None
        everywhere, query = self._mixed(query)
        if self.params.get("logits_eos_inf"):
            everywhere[:, :, self.eos_id] = -torch.inf
        temperature = self.params.get("temperature", 0.0)
        starts = torch.tensor([feed.start for feed in query.spans])
        at = query.row, query.position - starts[query.row]
        if self.cache is CacheMode.PREFIX and starts[0]:
            gumbel(everywhere, temperature, self.stream)  # drawn, and never used
        token = gumbel(everywhere, temperature, self.stream)[at].argmax(dim=-1)
        if self.params.get("confidence_eos_eot_inf"):
            # Without noise the original's noised logits are the logits, so end-of-text goes out of both.
            everywhere[:, :, [self.eot_id] if temperature else [self.eos_id, self.eot_id]] = -torch.inf
        confidence = everywhere[at].softmax(dim=-1).gather(1, token[:, None])[:, 0]
        if self.params.get("remasking") == "random":
            draw = torch.rand(everywhere.shape[:2], dtype=self.draw_type, generator=self.stream)
            confidence = draw[at]
        return Prediction(token, confidence, {})

    def _waste(self, query: Query) -> None:
        """The random numbers of a second forward over a finished block."""
        start, stop = int(query.position.min()), int(query.position.max()) + 1
        fed = stop - start if self.cache is CacheMode.DUAL else query.spans[0].stop - start
        temperature = self.params.get("temperature", 0.0)
        for _ in range(2 if self.cache is CacheMode.PREFIX else 1):
            gumbel(torch.zeros(len(query.canvases), fed, self.vocabulary), temperature, self.stream)
        if self.params.get("remasking") == "random":
            torch.rand(len(query.canvases), fed, dtype=self.draw_type, generator=self.stream)

    def _mixed(self, query: Query) -> tuple[Tensor, Query]:
        """Logits of all positions of each generation, the weighted sum of its views; and the query of the canvases."""
        logits, mixture = self.logits(query.canvases, query.spans), query.mixture
        if mixture is None:
            return logits, query
        weight = mixture.weight[torch.searchsorted(query.row, torch.arange(len(query.canvases)))]
        views = (weight[:, None, None] * logits).split(list(mixture.views))
        first = torch.tensor(mixture.views).cumsum(0) - torch.tensor(mixture.views)
        own = torch.isin(query.row, first)
        query = replace(
            query,
            canvases=[query.canvases[i] for i in first.tolist()],
            spans=[query.spans[i] for i in first.tolist()],
            row=torch.searchsorted(first, query.row[own]),
            position=query.position[own],
            mixture=None,
        )
        return torch.stack([each.sum(dim=0) for each in views]), query
