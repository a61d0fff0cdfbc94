"""What one forward pass says about each candidate position."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor


class Statistic(StrEnum):
    """A number per candidate that a sampler can ask for. Token and confidence are always computed.

    Entropy is in nats; margin is the difference of the two largest probabilities. Those of `chosen_` are of the
    distribution that the token is chosen from, after temperature, top-k and top-p, as is `chosen_confidence`.
    """

    ENTROPY = "entropy"
    MARGIN = "margin"
    CHOSEN_CONFIDENCE = "chosen_confidence"
    CHOSEN_ENTROPY = "chosen_entropy"
    CHOSEN_MARGIN = "chosen_margin"


CHOSEN = frozenset({Statistic.CHOSEN_CONFIDENCE, Statistic.CHOSEN_ENTROPY, Statistic.CHOSEN_MARGIN})


@dataclass(frozen=True)
class TokenChoice:
    """How a candidate's token is chosen from its distribution: greedily, or drawn at a temperature after filtering.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the smallest set of tokens whose probabilities reach this sum.
        top_k: draw from this many likeliest tokens; 0 does not limit.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class Bonus:
    """Sparse additions to logits: int64 [b] rows of logits, int64 [b] tokens, float32 [b] values."""

    index: Tensor
    token: Tensor
    value: Tensor

    def part(self, start: int, stop: int) -> "Bonus":
        """Of rows of logits from `start` to `stop`, counted from there."""
        mine = (self.index >= start) & (self.index < stop)
        return Bonus(self.index[mine] - start, self.token[mine], self.value[mine])

    def to(self, device: torch.device) -> "Bonus":
        return Bonus(*(each.to(device, non_blocking=True) for each in (self.index, self.token, self.value)))


@dataclass(frozen=True)
class Wanted:
    """What to say of each of n rows of logits beside token and confidence, and how to choose the token.

    Attributes:
        statistics: further numbers.
        choices: one per row; None chooses greedily everywhere.
        uniform: float [n] in [0, 1), a number for each row, needed where a choice has a temperature.
        top: how many of the largest probabilities to give; a vocabulary of fewer tokens is filled up with zeros.
        named: int64 [n, m], tokens whose probabilities are wanted; those of -1 are 0.
        bonus: what to add to the logits before anything else.
    """

    statistics: frozenset[Statistic] = frozenset()
    choices: Sequence[TokenChoice] | None = None
    uniform: Tensor | None = None
    top: int = 0
    named: Tensor | None = None
    bonus: Bonus | None = None

    def part(self, start: int, stop: int) -> "Wanted":
        """Of rows `start` to `stop`."""
        return replace(
            self,
            choices=self.choices and self.choices[start:stop],
            uniform=None if self.uniform is None else self.uniform[start:stop],
            named=None if self.named is None else self.named[start:stop],
            bonus=self.bonus and self.bonus.part(start, stop),
        )

    def to(self, device: torch.device) -> "Wanted":
        """With its tensors there."""
        return replace(
            self,
            uniform=None if self.uniform is None else self.uniform.to(device, non_blocking=True),
            named=None if self.named is None else self.named.to(device, non_blocking=True),
            bonus=self.bonus and self.bonus.to(device),
        )


NOTHING = Wanted()


@dataclass(frozen=True)
class Prediction:
    """Statistics of one forward pass at all positions that were asked for, flattened over the batch's rows.

    Attributes:
        token: int64 [n], what would be committed; never the mask token.
        confidence: float32 [n], probability of that token under the model's unmodified distribution.
        extra: further statistics that were asked for, float32 [n] each.
        top: the largest probabilities, descending, float32 [n, as many as were asked for]; None where none were.
        named: probabilities of the tokens that were named, float32 [n, as many]; None where none were.
    """

    token: Tensor
    confidence: Tensor
    extra: dict[Statistic, Tensor]
    top: Tensor | None = None
    named: Tensor | None = None

    @classmethod
    def join(cls, parts: "Sequence[Prediction]") -> "Prediction":
        """All rows of several, on the CPU."""
        top = [part.top for part in parts if part.top is not None]
        named = [part.named for part in parts if part.named is not None]
        return cls(
            torch.cat([part.token for part in parts]).cpu(),
            torch.cat([part.confidence for part in parts]).cpu(),
            {name: torch.cat([part.extra[name] for part in parts]).cpu() for name in parts[0].extra},
            torch.cat(top).cpu() if top else None,
            torch.cat(named).cpu() if named else None,
        )


def _likeliest(scores: Tensor) -> Tensor:
    """Index of the largest score of each row, the lowest index among equals."""
    if scores.device.type == "cpu":
        return scores.argmax(dim=-1)  # takes the first of equals on the CPU; elsewhere this is not promised
    index = torch.arange(scores.shape[-1], device=scores.device)
    largest = scores.amax(dim=-1, keepdim=True)
    return index.where(scores == largest, scores.shape[-1]).amin(dim=-1).clamp(max=scores.shape[-1] - 1)


def choosable(scores: Tensor, choices: Iterable[TokenChoice]) -> tuple[Tensor, Tensor]:
    """What tokens are drawn from: softmax(scores / temperature), filtered by top-k, then top-p, not normalised.

    Args:
        scores: float32 [n, vocab], -inf where a token is banned.
        choices: one per row; a temperature of 0 counts as 1.

    Returns:
        float64 [n, vocab], the likeliest first, and the tokens in that order.
    """
    choices = list(choices)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=scores.dtype, device=scores.device)[:, None]

    top_k = column([c.top_k if c.top_k > 0 else scores.shape[-1] for c in choices])
    top_p = column([c.top_p for c in choices])
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    p = (ordered / column([c.temperature or 1.0 for c in choices])).softmax(dim=-1, dtype=torch.float64)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    p = p.masked_fill(rank >= top_k, 0.0)
    before = p.cumsum(dim=-1) - p
    return p.masked_fill(before >= top_p * p.sum(dim=-1, keepdim=True), 0.0), order


def draw_tokens(p: Tensor, order: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row of what is `choosable`.

    Args:
        uniform: float [n] in [0, 1), the row's own random number: one draw costs one number whatever the vocabulary.
    """
    reach = p.cumsum(dim=-1)
    target = uniform.to(reach)[:, None] * reach[:, -1:]
    chosen = (reach <= target).sum(dim=-1, keepdim=True)
    # A target that rounds up to the whole mass would point past the last possible token.
    chosen = chosen.minimum((p > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(1, chosen)[:, 0]


def summarise(logits: Tensor, mask_id: int, wanted: Wanted = NOTHING) -> Prediction:
    """Token, confidence and what else is wanted of each row of logits.

    Args:
        logits: [n, vocab] of any float type; computed on in float32.
        mask_id: the token that is never chosen. Its probability still counts in the confidences of the others.
    """
    logits = logits.float()
    statistics, uniform, bonus = wanted.statistics, wanted.uniform, wanted.bonus
    if bonus is not None and len(bonus.index):
        logits = logits.index_put((bonus.index, bonus.token), bonus.value.to(logits), accumulate=True)
    logs = logits.log_softmax(dim=-1)
    allowed = logits.clone()
    allowed[:, mask_id] = -torch.inf
    token = _likeliest(allowed)
    choices = wanted.choices or [TokenChoice()] * len(logits)
    drawn = [i for i, choice in enumerate(choices) if choice.temperature > 0]
    # Rows that are shaped at all; without one of `CHOSEN`, a greedy row's shape does not matter.
    shaped = [i for i, c in enumerate(choices) if c != TokenChoice()] if statistics & CHOSEN else drawn
    extra: dict[Statistic, Tensor] = {}
    if statistics & CHOSEN:
        extra |= _chosen(logs.exp(), token, statistics)
    if shaped:
        rows = torch.tensor(shaped, device=logits.device)
        p, order = choosable(allowed[rows], [choices[i] for i in shaped])
        if drawn:
            if uniform is None:
                raise ValueError("drawing tokens at a temperature needs random numbers")
            at = [shaped.index(i) for i in drawn]
            token[drawn] = draw_tokens(p[at], order[at], uniform[drawn])
        p = p / p.sum(dim=-1, keepdim=True)
        place = (order == token[rows, None]).int().argmax(dim=-1)
        for name, values in _chosen(p, place, statistics).items():
            extra[name][rows] = values.float()
    confidence = logs.gather(1, token[:, None])[:, 0].exp()
    if Statistic.ENTROPY in statistics:
        p = logs.exp()
        extra[Statistic.ENTROPY] = -(p * logs.masked_fill(p == 0, 0.0)).sum(dim=-1)
    if Statistic.MARGIN in statistics:
        two = logs.topk(2, dim=-1).values.exp()
        extra[Statistic.MARGIN] = two[:, 0] - two[:, 1]
    largest = None
    if top := wanted.top:
        largest = logs.topk(min(top, logs.shape[-1]), dim=-1).values.exp()
        largest = torch.nn.functional.pad(largest, (0, top - largest.shape[-1]))
    known = None
    if wanted.named is not None:
        known = logs.gather(1, wanted.named.clamp(min=0)).exp().masked_fill(wanted.named < 0, 0.0)
    return Prediction(token, confidence, extra, largest, known)


def _chosen(p: Tensor, index: Tensor, statistics: frozenset[Statistic]) -> dict[Statistic, Tensor]:
    """Those of `CHOSEN` that are wanted, of distributions [n, vocab] and the index of what was chosen of each."""
    found: dict[Statistic, Tensor] = {}
    if Statistic.CHOSEN_CONFIDENCE in statistics:
        found[Statistic.CHOSEN_CONFIDENCE] = p.gather(1, index[:, None])[:, 0]
    if Statistic.CHOSEN_ENTROPY in statistics:
        found[Statistic.CHOSEN_ENTROPY] = torch.special.entr(p).sum(dim=-1)
    if Statistic.CHOSEN_MARGIN in statistics:
        two = p.topk(2, dim=-1).values
        found[Statistic.CHOSEN_MARGIN] = two[:, 0] - two[:, 1]
    return found
