"""The clearest decisions first."""

from pydantic import Field, model_validator

from samplers.base import Sampler, SamplerParams, Selection, Step
from samplers.canvas import Layout
from samplers.prediction import Statistic
from samplers.schedule import ScheduledParams, check_steps, passing_or_best


class Margin(Sampler):
    """Commit the candidates whose likeliest token is the furthest ahead of the second.

    Top probability margin of Kim et al., arXiv 2502.06768, section 4.
    """

    name = "margin"
    paper = "https://arxiv.org/abs/2502.06768"
    statistics = frozenset({Statistic.MARGIN})

    class Params(ScheduledParams):
        threshold: float | None = Field(
            None, gt=0, le=1, description="commit every candidate with a margin >= this, instead of a number"
        )

        @model_validator(mode="after")
        def _a_number_or_a_threshold(self) -> "Margin.Params":
            if self.threshold is not None and (self.k is not None or self.steps is not None):
                raise ValueError("give threshold or a number of tokens, not both")
            return self

    def check(self, params: SamplerParams, layout: Layout) -> None:
        check_steps(params, layout)

    def select(self, step: Step) -> Selection:
        thresholds = [getattr(params, "threshold", None) for params in step.params]
        return passing_or_best(step, step.extra[Statistic.MARGIN], thresholds)
