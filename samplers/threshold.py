"""Everything sure enough."""

from pydantic import Field

from samplers.base import Sampler, SamplerParams, Selection, Step


class Threshold(Sampler):
    """Commit every candidate at least as sure as a threshold, and always the surest one.

    Fast-dLLM, arXiv 2505.22618, section 3.3.
    """

    name = "threshold"
    paper = "https://arxiv.org/abs/2505.22618"

    class Params(SamplerParams):
        threshold: float = Field(0.9, gt=0, le=1, description="commit candidates with confidence >= this")

    def select(self, step: Step) -> Selection:
        return Selection(commit=step.candidate & (step.confidence >= step.param("threshold")))
