"""Largest margin first."""

from pydantic import Field

from samplers.contract import Selection, Step
from samplers.forward.statistics import Statistic
from samplers.schedule import NumberOrThresholdParams, ScheduledParams, ScheduledSampler, passing_or_best


class Margin(ScheduledSampler):
    """Commit the candidates whose likeliest token is the furthest ahead of the second.

    Top probability margin of Kim et al., arXiv 2502.06768, section 4.
    """

    name = "margin"
    paper = "https://arxiv.org/abs/2502.06768"
    statistics = frozenset({Statistic.MARGIN})

    class Params(NumberOrThresholdParams):
        threshold: float | None = Field(
            None, gt=0, le=1, description="commit every candidate with a margin >= this, instead of a number"
        )

    def select(self, step: Step[ScheduledParams]) -> Selection:
        return passing_or_best(step, step.extra[Statistic.MARGIN], step.param("threshold", none=float("inf")))
