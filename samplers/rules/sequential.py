"""Left to right."""

from samplers.contract import Selection, Step
from samplers.ranking import best
from samplers.schedule import ScheduledParams, ScheduledSampler, quota_for_best


class Sequential(ScheduledSampler):
    """Commit the leftmost candidates, a fixed number per forward pass.

    SDAR's `sequential` (arXiv 2510.06303, its generate.py); with k = 1 the order of an autoregressive model.
    """

    name = "sequential"
    paper = "https://arxiv.org/abs/2510.06303"

    def select(self, step: Step[ScheduledParams]) -> Selection:
        return Selection(best(-step.position.float(), step.candidate, quota_for_best(step)))
