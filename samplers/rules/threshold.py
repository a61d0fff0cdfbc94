"""All candidates above a confidence threshold."""

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import Selection, Step
from samplers.ranking import best
from samplers.schedule import ScheduledParams, ScheduledSampler, quota_for_best


class Threshold(ScheduledSampler):
    """Commit every candidate at least as sure as a threshold, and always the surest one.

    Fast-dLLM, arXiv 2505.22618, section 3.3. `k` or `steps` set a minimum per forward: SDAR's `low_confidence_dynamic`
    (arXiv 2510.06303) and the rule of LLaDA2.0. On these two and Fast-dLLM v2 a candidate must be surer than the
    threshold, as in their own programs: at 1, one is committed per forward.
    """

    name = "threshold"
    paper = "https://arxiv.org/abs/2505.22618"

    class Params(ScheduledParams):
        threshold: float = Field(
            0.9, gt=0, le=1, description="commit candidates with confidence >= this; > on LLaDA2, SDAR and Fast-dLLM v2"
        )

    def select(self, step: Step[ScheduledParams]) -> Selection:
        sure = step.candidate & (step.confidence >= step.columns.keep("least", lambda: _least(step)))
        if not (step.columns.any_given("k") or step.columns.any_given("steps")):
            return Selection(sure)  # the loop commits the surest if nothing passes
        return Selection(sure | best(step.confidence, step.candidate, quota_for_best(step)))


def _least(step: Step[ScheduledParams]) -> Tensor:
    """Lowest confidence that passes, float32 [rows, 1]."""
    threshold = step.param("threshold")
    above = torch.nextafter(threshold, torch.full_like(threshold, torch.inf))
    return torch.where(step.layout.strict, above, threshold)
