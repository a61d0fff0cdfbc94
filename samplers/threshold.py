"""Everything sure enough."""

from pydantic import Field

from samplers.base import Selection, Step, best
from samplers.schedule import ScheduledParams, ScheduledSampler, quota


class Threshold(ScheduledSampler):
    """Commit every candidate at least as sure as a threshold, and always the surest one.

    Fast-dLLM, arXiv 2505.22618, section 3.3. With `k` or `steps` at least so many a forward are committed: SDAR's
    `low_confidence_dynamic` (arXiv 2510.06303) and the rule of LLaDA2.0.
    """

    name = "threshold"
    paper = "https://arxiv.org/abs/2505.22618"

    class Params(ScheduledParams):
        threshold: float = Field(0.9, gt=0, le=1, description="commit candidates with confidence >= this")

    def select(self, step: Step) -> Selection:
        least = best(step.confidence, step.candidate, quota(step))
        return Selection(least | (step.candidate & (step.confidence >= step.param("threshold"))))
