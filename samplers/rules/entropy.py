"""Lowest entropy first."""

from pydantic import Field

from samplers.contract import Selection, Step
from samplers.forward.statistics import Statistic
from samplers.schedule import NumberOrThresholdParams, ScheduledParams, ScheduledSampler, passing_or_best


class Entropy(ScheduledSampler):
    """Commit the candidates whose distribution has the lowest entropy, a fixed number per forward pass.

    Dream 7B, arXiv 2508.15487, and dLLM-RL, arXiv 2509.06949, offer it beside confidence and margin.
    """

    name = "entropy"
    paper = "https://arxiv.org/abs/2508.15487"
    statistics = frozenset({Statistic.ENTROPY})

    class Params(NumberOrThresholdParams):
        threshold: float | None = Field(
            None,
            ge=0,
            le=100,
            description="commit every candidate with an entropy <= this, in nats, instead of a number",
        )

    def select(self, step: Step[ScheduledParams]) -> Selection:
        # Nothing passes a null bound.
        return passing_or_best(step, -step.extra[Statistic.ENTROPY], -step.param("threshold", none=-float("inf")))
