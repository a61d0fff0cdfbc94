"""Commits up to a bound on their mutual dependence."""

from typing import Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.forward.statistics import Statistic
from samplers.ranking import prefix


class EntropyBound(Sampler[SamplerParams]):
    """Commit the surest candidates for as long as their entropies but the largest sum up to at most a bound.

    That sum bounds the mutual information of the tokens. EB-Sampler, arXiv 2505.24857, section 4.
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
        # Non-candidates sort last; their infinite entropy must not enter the sums before them.
        entropy = step.extra[Statistic.ENTROPY].masked_fill(~step.candidate, torch.inf)
        if step.columns.all_have("proxy", "entropy"):
            entropies, order = entropy.sort(dim=1, stable=True)
        else:
            order = self._error(step, entropy).argsort(dim=1, stable=True)
            entropies = entropy.gather(1, order)
        entropies = entropies.clamp_(max=1e6).double()
        largest = entropies.cummax(dim=1).values.masked_fill(step.param("count_largest"), 0.0)
        passes = entropies.cumsum(dim=1) - largest <= step.param("gamma")
        passes[:, 0] = True  # always commit one, whatever its entropy
        return Selection(step.candidate & prefix(passes, order))

    def _error(self, step: Step[SamplerParams], entropy: Tensor) -> Tensor:
        """Uncertainty of each candidate by the measure that its row selects."""
        error = torch.where(step.option("proxy", "confidence"), -step.confidence, entropy)
        error = torch.where(step.option("proxy", "margin"), -step.extra[Statistic.MARGIN], error)
        return error.masked_fill(~step.candidate, torch.inf)
