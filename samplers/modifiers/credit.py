"""Credit for tokens that were likely in earlier steps."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from samplers.attention_pattern import AttentionPattern
from samplers.contract import (
    Adjustment,
    Modifier,
    Sampler,
    SamplerParams,
    Selection,
    StateSpec,
    Step,
    StepContext,
)
from samplers.ranking import surest


class CreditParams(SamplerParams):
    alpha: float = Field(0.7, ge=0, le=100, description="how much credit adds to the logits")
    gamma: float = Field(0.2, ge=0, le=100, description="power of the probability that is gained")
    beta: float = Field(0.8, ge=0, le=1, description="what is left of credit after a step")


class Credit(Modifier[CreditParams]):
    """Raise probabilities of tokens that were the likeliest at their position in steps before.

    Each step credit falls by a factor, the likeliest token of each candidate gains a power of its probability, and
    logits gain `alpha` ln(1 + credit). CreditDecoding, arXiv 2510.06133; constants of dInfer. Tokens are chosen
    greedily.
    """

    name = "credit"
    paper = "https://arxiv.org/abs/2510.06133"
    chooses_tokens = True
    # Only tokens that were once the likeliest have credit: a short list per position instead of a vocabulary.
    state = {
        "token": StateSpec(-1, torch.int64, per="position", shape=(0,)),
        "credit": StateSpec(0.0, per="position", shape=(0,)),
    }
    Params = CreditParams

    def incompatibility(
        self, sampler: Sampler[Any], pattern: AttentionPattern, before: Sequence[Modifier[Any]]
    ) -> str | None:
        if sampler.chooses_tokens or sampler.drafts:
            return f"modifier credit chooses tokens itself, and so does sampler {sampler.name}"
        if sampler.has_slots():
            return (
                f"modifier credit takes the likeliest tokens, so that all texts of sampler {sampler.name} were the same"
            )
        if sampler.statistics or sampler.top:
            read = ", ".join(sorted(sampler.statistics)) or "other probabilities"
            return f"modifier credit raises confidences only, and sampler {sampler.name} reads {read}"
        return None

    def name_tokens(self, context: StepContext[Any]) -> Tensor | None:
        found = context.state["token"]
        return found if found.shape[2] else None

    def adjust(self, step: Step[Any]) -> Adjustment:
        known, credit = step.state["token"], step.state["credit"] * step.param("beta")[..., None]
        likeliest, at, p = step.token, step.candidate, step.confidence.clamp(min=0.0)
        named = torch.zeros_like(credit) if step.named is None else step.named[:, :, : known.shape[2]]
        same = (known == likeliest[..., None]) & at[..., None]
        new = at & ~same.any(dim=2)
        known = torch.cat([known, likeliest.where(new, -1)[..., None]], dim=2)
        credit = torch.nn.functional.pad(credit, (0, 1))
        named = torch.cat([named, p.where(new, 0.0)[..., None]], dim=2)
        mine = torch.cat([same, new[..., None]], dim=2)
        credit = credit + mine * (p ** step.param("gamma"))[..., None]
        # The bonus multiplies a probability by (1 + credit) ** alpha; tokens without credit keep theirs.
        raised = _raised(named, credit, step.param("alpha")[..., None])
        best = raised.masked_fill(known < 0, -1.0).max(dim=2)
        chosen = known.gather(2, best.indices[..., None])[..., 0]
        used = (known >= 0).any(dim=1).any(dim=0)
        return Adjustment(
            token=chosen.where(at, step.token),
            confidence=best.values.where(at, step.confidence),
            state={"token": known[:, :, used], "credit": credit[:, :, used]},
        )


def _raised(named: Tensor, credit: Tensor, alpha: Tensor) -> Tensor:
    """Probabilities [rows, width, m] scaled by (1 + credit) ** alpha, in the distribution normalised again."""
    raised = named * (1 + credit) ** alpha
    total = 1 + (raised - named).sum(dim=2, keepdim=True)
    found = raised / total
    if bool(total.isfinite().all()):
        return found
    # Weights beyond the range of float32 are taken relative to the largest.
    log = alpha * (1 + credit).log()
    largest = log.amax(dim=2, keepdim=True).clamp(min=0.0)
    raised = named * (log - largest).exp()
    rest = (1 - named.sum(dim=2, keepdim=True)).clamp(min=0.0) * (-largest).exp()
    safe = raised / (rest + raised.sum(dim=2, keepdim=True)).clamp(min=torch.finfo(raised.dtype).tiny)
    return torch.where(total.isfinite(), found, safe)


class CreditThresholdParams(CreditParams):
    threshold: float = Field(0.9, gt=0, le=1, description="commit candidates with a raised confidence >= this")


class CreditThreshold(Sampler[CreditThresholdParams]):
    """Commit above a threshold, of probabilities that are raised for tokens that were the likeliest in steps before.

    The rule `threshold` with the modifier `credit` around it: each step credit falls by a factor, the likeliest token
    of each candidate gains a power of its probability, and logits gain `alpha` ln(1 + credit). CreditDecoding,
    arXiv 2510.06133; constants of dInfer. Greedy.
    """

    name = "credit"
    paper = "https://arxiv.org/abs/2510.06133"
    chooses_tokens = True
    state = Credit.state
    modifier = Credit()
    Params = CreditThresholdParams

    def name_tokens(self, context: StepContext[CreditThresholdParams]) -> Tensor | None:
        return self.modifier.name_tokens(context)

    def select(self, step: Step[CreditThresholdParams]) -> Selection:
        found = self.modifier.adjust(step)
        assert found.confidence is not None
        sure = step.candidate & (found.confidence >= step.param("threshold"))
        first = surest(found.confidence, step.candidate)
        return Selection(sure | first, token=found.token, confidence=found.confidence, state=found.state)
