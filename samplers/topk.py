"""The surest first, a fixed number per forward."""

from samplers.base import Sampler, SamplerParams, Selection, Step, best
from samplers.canvas import Layout
from samplers.schedule import ScheduledParams, check_steps, quota


class TopK(Sampler):
    """Commit the surest candidates, a fixed number per forward pass (LLaDA's low-confidence remasking).

    LLaDA, arXiv 2502.09992, algorithm 5; `steps` is its schedule.
    """

    name = "topk"
    paper = "https://arxiv.org/abs/2502.09992"
    Params = ScheduledParams

    def check(self, params: SamplerParams, layout: Layout) -> None:
        check_steps(params, layout)

    def select(self, step: Step) -> Selection:
        return Selection(commit=best(step.confidence, step.candidate, quota(step)))
