"""Confidence bound that depends on the number of commits."""

import torch
from pydantic import Field

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.ranking import prefix


class Factor(Sampler[SamplerParams]):
    """Commit the surest candidates as long as the r-th of them reaches 1 - factor / (r + 1).

    Fast-dLLM, arXiv 2505.22618, section 3.3 and theorem 1.
    """

    name = "factor"
    paper = "https://arxiv.org/abs/2505.22618"

    class Params(SamplerParams):
        factor: float = Field(1.0, gt=0, le=1000, description="how much may go wrong together; below 1 is more careful")

    def select(self, step: Step[SamplerParams]) -> Selection:
        ranked, order = step.confidence.masked_fill(~step.candidate, -torch.inf).sort(
            dim=1, descending=True, stable=True
        )
        rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        passes = ranked >= 1 - step.param("factor") / (rank + 1)
        passes[:, :1] = True  # the surest always passes
        return Selection(step.candidate & prefix(passes, order))
