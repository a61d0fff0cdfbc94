"""Random order."""

from samplers.base import Sampler, SamplerParams, Selection, Step, best
from samplers.canvas import Layout
from samplers.schedule import ScheduledParams, check_steps, quota


class Random(Sampler):
    """Commit candidates in random order, a fixed number per forward pass; the baseline of every comparison."""

    name = "random"
    paper = "https://arxiv.org/abs/2502.09992"
    Params = ScheduledParams

    def check(self, params: SamplerParams, layout: Layout) -> None:
        check_steps(params, layout)

    def select(self, step: Step) -> Selection:
        return Selection(commit=best(step.uniform(), step.candidate, quota(step)))
