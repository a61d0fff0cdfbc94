"""Random order."""

from samplers.contract import Selection, Step
from samplers.ranking import best
from samplers.schedule import ScheduledParams, ScheduledSampler, quota_for_best


class Random(ScheduledSampler):
    """Commit candidates in random order, a fixed number per forward pass; the baseline of every comparison."""

    name = "random"
    paper = "https://arxiv.org/abs/2502.09992"

    def select(self, step: Step[ScheduledParams]) -> Selection:
        return Selection(best(step.uniform(), step.candidate, quota_for_best(step)))
