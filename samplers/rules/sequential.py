"""From left to right."""

import torch

from samplers.contract import Selection, Step
from samplers.ranking import best
from samplers.schedule import ScheduledSampler, quota


class Sequential(ScheduledSampler):
    """Commit the leftmost candidates, a fixed number per forward pass.

    SDAR's `sequential` (arXiv 2510.06303, its generate.py); with k = 1 the order of an autoregressive model.
    """

    name = "sequential"
    paper = "https://arxiv.org/abs/2510.06303"

    def select(self, step: Step) -> Selection:
        place = -torch.arange(step.candidate.shape[1], dtype=torch.float32, device=step.candidate.device)
        return Selection(best(place.expand(step.candidate.shape), step.candidate, quota(step)))
