"""Highest confidence first, a fixed number per forward."""

from samplers.contract import Selection, Step
from samplers.ranking import best
from samplers.schedule import ScheduledParams, ScheduledSampler, quota_for_best


class TopK(ScheduledSampler):
    """Commit the surest candidates, a fixed number per forward pass (LLaDA's low-confidence remasking).

    LLaDA, arXiv 2502.09992, algorithm 5; `steps` is its schedule.
    """

    name = "topk"
    paper = "https://arxiv.org/abs/2502.09992"

    def select(self, step: Step[ScheduledParams]) -> Selection:
        return Selection(best(step.confidence, step.candidate, quota_for_best(step)))
