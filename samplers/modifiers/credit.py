"""What was likely before counts."""

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import Sampler, SamplerParams, Selection, Step


@dataclass(frozen=True)
class Credits:
    """Tokens that were ever the likeliest at each position, and their credit; [gen_length, m], -1 and 0 where empty.

    `block` is the block they belong to.
    """

    token: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    credit: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    block: int = -1


class Credit(Sampler):
    """Commit above a threshold, of probabilities that are raised for tokens that were the likeliest in steps before.

    Each step credit falls by a factor, the likeliest token of each candidate gains a power of its probability, and
    logits gain `alpha` ln(1 + credit). CreditDecoding, arXiv 2510.06133; constants of dInfer. Greedy.
    """

    name = "credit"
    paper = "https://arxiv.org/abs/2510.06133"
    greedy = True

    class Params(SamplerParams):
        threshold: float = Field(0.9, gt=0, le=1, description="commit candidates with a raised confidence >= this")
        alpha: float = Field(0.7, ge=0, le=100, description="how much credit adds to the logits")
        gamma: float = Field(0.2, ge=0, le=100, description="power of the probability that is gained")
        beta: float = Field(0.8, ge=0, le=1, description="what is left of credit after a step")

    def start(self, params: SamplerParams) -> Credits:
        return Credits()

    def name_tokens(self, state: Any, positions: Tensor) -> Tensor | None:
        return state.token[positions] if len(state.token) else None

    def select(self, step: Step) -> Selection:
        token, confidence = step.token.clone(), step.confidence.clone()
        states = [
            self._raise(step, i, layout.gen_length, token[i], confidence[i]) for i, layout in enumerate(step.layouts)
        ]
        sure = step.candidate & (confidence >= step.param("threshold"))
        first = (confidence == confidence.masked_fill(~step.candidate, -torch.inf).amax(dim=1, keepdim=True)).int()
        surest = torch.zeros_like(sure).scatter(1, first.argmax(dim=1, keepdim=True), True) & step.candidate
        return Selection(sure | surest, token=token, confidence=confidence, states=states)

    def _raise(self, step: Step, row: int, length: int, token: Tensor, confidence: Tensor) -> Credits:
        """Put the raised choice of one row in place; returns its tokens with their new credit."""
        params, state = step.params[row], step.states[row]
        assert isinstance(params, Credit.Params)
        known, credit = state.token, state.credit
        if len(known) == 0:
            known, credit = torch.full((length, 0), -1), torch.zeros(length, 0)
        block = int(step.block[row])
        credit = credit * (params.beta if state.block == block else 0.0)
        at = step.candidate[row, :length]
        likeliest, p = step.token[row, :length], step.confidence[row, :length].clamp(min=0.0)
        named = torch.zeros(length, 0) if step.named is None else step.named[row, :length, : known.shape[1]]
        same = (known == likeliest[:, None]) & at[:, None]
        new = at & ~same.any(dim=1)
        known = torch.cat([known, likeliest.where(new, -1)[:, None]], dim=1)
        credit = torch.cat([credit, torch.zeros(length, 1)], dim=1)
        named = torch.cat([named, p.where(new, 0.0)[:, None]], dim=1)
        mine = torch.cat([same, new[:, None]], dim=1)
        credit = credit + mine * (p**params.gamma)[:, None]
        # (1 + credit) ** alpha is what the bonus multiplies a probability by; tokens without credit keep theirs.
        weight = (1 + credit) ** params.alpha
        raised = named * weight
        raised = raised / (1 + (raised - named).sum(dim=1, keepdim=True))
        best = raised.masked_fill(known < 0, -1.0).max(dim=1)
        chosen = known.gather(1, best.indices[:, None])[:, 0]
        token[:length] = chosen.where(at, token[:length])
        confidence[:length] = best.values.where(at, confidence[:length])
        used = (known >= 0).any(dim=0)
        return Credits(known[:, used], credit[:, used], block)
