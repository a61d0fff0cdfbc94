"""The least uncertain first."""

from pydantic import Field, model_validator

from samplers.base import Sampler, SamplerParams, Selection, Step
from samplers.canvas import Layout
from samplers.prediction import Statistic
from samplers.schedule import ScheduledParams, check_steps, passing_or_best


class Entropy(Sampler):
    """Commit the candidates whose distribution has the lowest entropy, a fixed number per forward pass.

    Dream 7B, arXiv 2508.15487, and dLLM-RL, arXiv 2509.06949, offer it beside confidence and margin.
    """

    name = "entropy"
    paper = "https://arxiv.org/abs/2508.15487"
    statistics = frozenset({Statistic.ENTROPY})

    class Params(ScheduledParams):
        threshold: float | None = Field(
            None,
            ge=0,
            le=100,
            description="commit every candidate with an entropy <= this, in nats, instead of a number",
        )

        @model_validator(mode="after")
        def _a_number_or_a_threshold(self) -> "Entropy.Params":
            if self.threshold is not None and (self.k is not None or self.steps is not None):
                raise ValueError("give threshold or a number of tokens, not both")
            return self

    def check(self, params: SamplerParams, layout: Layout) -> None:
        check_steps(params, layout)

    def select(self, step: Step) -> Selection:
        thresholds = [getattr(params, "threshold", None) for params in step.params]
        bounds = [None if value is None else -value for value in thresholds]
        return passing_or_best(step, -step.extra[Statistic.ENTROPY], bounds)
