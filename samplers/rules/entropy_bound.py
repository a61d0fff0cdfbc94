"""As much as can depend on one another only so far."""

from typing import Literal

import torch
from pydantic import AliasChoices, Field

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.forward.statistics import Statistic
from samplers.ranking import prefix


class EntropyBound(Sampler[SamplerParams]):
    """Commit the surest candidates for as long as their entropies but the largest sum up to at most a bound.

    That sum bounds how much the tokens can tell about one another. EB-Sampler, arXiv 2505.24857, section 4.
    """

    name = "entropy_bound"
    paper = "https://arxiv.org/abs/2505.24857"
    statistics = frozenset({Statistic.ENTROPY, Statistic.MARGIN})

    class Params(SamplerParams):
        gamma: float = Field(0.1, ge=0, le=1000, description="bound in nats; 0 commits one, and what has no entropy")
        count_largest: bool = Field(
            False,
            validation_alias=AliasChoices("count_largest", "own"),
            description="count every entropy, the largest too: SDAR's and JetEngine's entropy_bounded, 0.35 there",
        )
        proxy: Literal["entropy", "confidence", "margin"] = Field("entropy", description="what surest means")

    def select(self, step: Step[SamplerParams]) -> Selection:
        entropy = step.extra[Statistic.ENTROPY].masked_fill(~step.candidate, torch.inf)
        error = torch.where(step.option("proxy", "confidence"), -step.confidence, entropy)
        error = torch.where(step.option("proxy", "margin"), -step.extra[Statistic.MARGIN], error)
        order = error.masked_fill(~step.candidate, torch.inf).argsort(dim=1, stable=True)
        # What is no candidate comes last; its entropy must not make infinity of what is before it.
        sorted_entropy = entropy.gather(1, order).clamp(max=1e6).double()
        largest = sorted_entropy.cummax(dim=1).values.masked_fill(step.param("count_largest"), 0.0)
        passes = sorted_entropy.cumsum(dim=1) - largest <= step.param("gamma")
        passes[:, :1] = True  # one goes, whatever its own entropy
        return Selection(step.candidate & prefix(passes, order))
