"""From logits to statistics: one pass over each row for everything requested."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samplers.forward.prediction import Prediction
from samplers.forward.statistics import CHOSEN, NOTHING, Statistic, StatisticsRequest
from samplers.forward.token_choice import TokenChoices

PART = 1 << 20
"""Number of logits processed at a time: results of one pass are still in the cache during the next."""


def summarise(logits: Tensor, mask_id: int | None, wanted: StatisticsRequest = NOTHING) -> Prediction:
    """Compute token, confidence and the requested statistics of each row of logits.

    Args:
        logits: [n, vocab] of any float type; converted to float32.
        mask_id: token that is never chosen, if there is one. Its probability still counts in the confidences of the
            others.
    """
    size = max(1, PART // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    starts = range(0, max(1, len(logits)), max(1, size))
    return Prediction.join([_part(logits[i : i + size], mask_id, wanted.part(i, i + size)) for i in starts])


def _part(logits: Tensor, mask_id: int | None, wanted: StatisticsRequest) -> Prediction:
    logits = logits.float()
    bonus = wanted.bonus
    if bonus is not None and len(bonus.index):
        bonus = bonus.to(logits.device)
        logits = logits.index_put((bonus.index, bonus.token), bonus.value.to(logits), accumulate=True)
    largest = logits.amax(dim=-1, keepdim=True)
    # Relative to the largest: no probability overflows, and the largest is exactly 1.
    relative = (logits - largest).exp_()
    total = relative.sum(dim=-1, keepdim=True)
    token = _likeliest(logits, mask_id)
    extra: dict[Statistic, Tensor] = {}
    if Statistic.LIKELIEST in wanted.statistics:
        extra[Statistic.LIKELIEST] = token.float()  # exact up to a vocabulary of 2 ** 24
    for name, (chosen_name, value) in _VALUES.items():
        if {name, chosen_name} & wanted.statistics:
            extra[name] = _of(_rows(wanted, name, chosen_name), logits, total, value)
            extra[chosen_name] = extra[name].clone()
    token, chosen = _choose(logits, token, mask_id, wanted)
    confidence = (relative.gather(1, token[:, None]) / total)[:, 0]
    if Statistic.CHOSEN_CONFIDENCE in wanted.statistics:
        extra[Statistic.CHOSEN_CONFIDENCE] = confidence.clone()
    for name, (rows, values) in chosen.items():
        extra[name][rows] = values.float()
    top = None
    if wanted.top:
        top = _of(_rows(wanted, "top"), logits, total, lambda x, sums: _top(x, sums, wanted.top), wanted.top)
    named = None
    if wanted.named is not None:
        named = relative.gather(1, wanted.named.clamp(min=0)) / total
        named = named.masked_fill(wanted.named < 0, 0.0)
    return Prediction(token, confidence, {name: extra[name] for name in wanted.statistics}, top, named)


def _likeliest(logits: Tensor, mask_id: int | None) -> Tensor:
    """Index of the largest logit of each row except the mask token's, the lowest in case of ties."""
    if mask_id is None:
        return _first_of_largest(logits)[1]
    vocabulary = logits.shape[-1]
    if not 0 < mask_id < vocabulary - 1:
        start = int(mask_id == 0)
        return _first_of_largest(logits[:, start : vocabulary - (mask_id == vocabulary - 1)])[1] + start
    before, first = _first_of_largest(logits[:, :mask_id])
    after, second = _first_of_largest(logits[:, mask_id + 1 :])
    return torch.where(before >= after, first, second + mask_id + 1)


def _first_of_largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row and its first index."""
    if scores.device.type == "cpu":
        largest, place = scores.max(dim=-1)  # first in case of ties on the CPU; not guaranteed elsewhere
        return largest, place
    index = torch.arange(scores.shape[-1], device=scores.device)
    largest = scores.amax(dim=-1, keepdim=True)
    place = index.where(scores == largest, scores.shape[-1]).amin(dim=-1).clamp(max=scores.shape[-1] - 1)
    return largest[:, 0], place


Value = Callable[[Tensor, Tensor], Tensor]
"""Function of logits [n, vocab] and sums of their exponentials relative to the largest [n, 1]; gives [n] or [n,
width]."""


def _entropy(logits: Tensor, total: Tensor) -> Tensor:
    below = (logits - logits.amax(dim=-1, keepdim=True)).clamp_(min=-100.0)  # exp(-100) is negligible beside 1
    mean: Tensor = torch.linalg.vecdot(below.exp(), below) / total[:, 0]
    return total[:, 0].log() - mean


def _margin(logits: Tensor, total: Tensor) -> Tensor:
    two = _top(logits, total, 2)
    return two[:, 0] - two[:, 1]


def _top(logits: Tensor, total: Tensor, count: int) -> Tensor:
    """The largest probabilities, padded with zeros if the vocabulary is smaller."""
    found = logits.topk(min(count, logits.shape[-1]), dim=-1).values
    found = (found - found[:, :1]).exp() / total
    return torch.nn.functional.pad(found, (0, count - found.shape[-1]))


_VALUES: dict[Statistic, tuple[Statistic, Value]] = {
    Statistic.ENTROPY: (Statistic.CHOSEN_ENTROPY, _entropy),
    Statistic.MARGIN: (Statistic.CHOSEN_MARGIN, _margin),
}
"""Each statistic with its counterpart for the distribution that tokens are chosen from; equal if that is unmodified."""


def _rows(wanted: StatisticsRequest, *names: str) -> Tensor | None:
    """Indices of the rows that request one of these; None for all."""
    wishes = [wanted.only.get(name) for name in names if name == "top" or name in wanted.statistics]
    some = [wish for wish in wishes if wish is not None]
    return torch.stack(some).any(dim=0) if len(some) == len(wishes) else None


def _of(rows: Tensor | None, logits: Tensor, total: Tensor, value: Value, width: int = 0) -> Tensor:
    """A statistic at these rows, NaN elsewhere."""
    if rows is None:
        return value(logits, total)
    index = rows.nonzero()[:, 0].to(logits.device, non_blocking=True)
    out = logits.new_full((len(logits), width) if width else (len(logits),), torch.nan)
    out[index] = value(logits[index], total[index])
    return out


def _choose(
    logits: Tensor, token: Tensor, mask_id: int | None, wanted: StatisticsRequest
) -> tuple[Tensor, dict[Statistic, tuple[Tensor, Tensor]]]:
    """Tokens, drawn in rows with a temperature, and statistics of rows with a modified distribution."""
    choices, shaping = wanted.choices, wanted.statistics & CHOSEN
    if choices is None:
        return token, {}
    # Unless a statistic of `CHOSEN` is requested, filters do not matter in greedy rows.
    shaped = choices.temperature > 0
    if shaping:
        shaped = shaped | ~choices.plain
    if not bool(shaped.any()):
        return token, {}
    index = shaped.nonzero()[:, 0]
    choices = choices[index]
    rows = index.to(logits.device, non_blocking=True)
    scores = logits[rows]
    if mask_id is not None:
        scores[:, mask_id] = -torch.inf
    p, order = choosable(scores, choices)
    drawn = (choices.temperature > 0).nonzero()[:, 0].to(logits.device, non_blocking=True)
    if len(drawn):
        if wanted.uniform is None:
            raise ValueError("drawing tokens at a temperature needs random numbers")
        token[rows[drawn]] = draw_tokens(p[drawn], order[drawn], wanted.uniform[rows[drawn]])
    if not shaping:
        return token, {}
    p = p / p.sum(dim=-1, keepdim=True)
    found: dict[Statistic, Callable[[], Tensor]] = {
        Statistic.CHOSEN_CONFIDENCE: lambda: p.gather(
            1, (order == token[rows, None]).int().argmax(dim=-1, keepdim=True)
        )[:, 0],
        Statistic.CHOSEN_ENTROPY: lambda: torch.special.entr(p).sum(dim=-1),
        Statistic.CHOSEN_MARGIN: lambda: -p.topk(2, dim=-1).values.diff(dim=-1)[:, 0],
    }
    return token, {name: (rows, found[name]()) for name in shaping}


def choosable(scores: Tensor, choices: TokenChoices) -> tuple[Tensor, Tensor]:
    """Unnormalised distribution of tokens: softmax(scores / temperature), filtered by top-k, then top-p.

    Args:
        scores: float32 [n, vocab], -inf for banned tokens.
        choices: one per row; a temperature of 0 counts as 1.

    Returns:
        float64 [n, vocab], and the token of each entry: likeliest first if there are filters, which need the order;
            otherwise by token id, since sorting takes longer than all the rest.
    """
    filtered = choices.filtered
    if bool(filtered.any()) and not bool(filtered.all()):
        none = replace(choices, top_p=torch.ones_like(choices.top_p), top_k=torch.zeros_like(choices.top_k))
        p, order = choosable(scores, none)
        index = filtered.nonzero()[:, 0]
        rows = index.to(scores.device, non_blocking=True)
        order = order.clone()  # one row expanded to all
        p[rows], order[rows] = choosable(scores[rows], choices[index])
        return p, order

    def column(values: Tensor) -> Tensor:
        return values.to(scores.device, scores.dtype)[:, None]

    heat = column(torch.where(choices.temperature > 0, choices.temperature, 1.0))
    if not bool(filtered.any()):
        order = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        return (scores / heat).softmax(dim=-1, dtype=torch.float64), order
    top_k = column(torch.where(choices.top_k > 0, choices.top_k, scores.shape[-1]))
    top_p = column(choices.top_p)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    p = (ordered / heat).softmax(dim=-1, dtype=torch.float64)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    p = p.masked_fill(rank >= top_k, 0.0)
    before = p.cumsum(dim=-1) - p
    return p.masked_fill(before >= top_p * p.sum(dim=-1, keepdim=True), 0.0), order


def draw_tokens(p: Tensor, order: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row from the result of `choosable`.

    Args:
        uniform: float [n] in [0, 1), random number of the row: one draw costs one number regardless of the vocabulary.
    """
    reach = p.cumsum(dim=-1)
    target = uniform.to(reach)[:, None] * reach[:, -1:]
    chosen = (reach <= target).sum(dim=-1, keepdim=True)
    # A target rounded up to the total mass would point past the last possible token.
    place = torch.arange(p.shape[-1], device=p.device)
    chosen = chosen.minimum(place.where(p > 0, 0).amax(dim=-1, keepdim=True))
    return order.gather(1, chosen)[:, 0]
