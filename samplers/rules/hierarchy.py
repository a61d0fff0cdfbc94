"""Something in every gap."""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import Sampler, SamplerParams, Selection, Step
from samplers.ranking import best


class Hierarchy(Sampler):
    """Commit the surest candidate of every gap if it is sure enough, all that are very sure, and always the surest.

    A gap is a run of candidates side by side: what is committed splits it, so that far ends fill up at once.
    dInfer, arXiv 2510.08666, hierarchical decoding.
    """

    name = "hierarchy"
    paper = "https://arxiv.org/abs/2510.08666"

    class Params(SamplerParams):
        threshold: float | None = Field(
            0.9, gt=0, le=1, description="commit every candidate above this confidence; null: none for that"
        )
        low_threshold: float | None = Field(
            0.4, ge=0, le=1, description="commit the surest of a gap above this confidence; null: whatever it is"
        )

    def select(self, step: Step) -> Selection:
        def bound(name: str, without: float) -> Tensor:
            values = [getattr(params, name) for params in step.params]
            return step.confidence.new_tensor([without if value is None else value for value in values])[:, None]

        sure = step.confidence > bound("threshold", 2.0)
        leading = leading_of_gaps(step.candidate, step.confidence)
        return Selection(step.candidate & (sure | (leading & (step.confidence > bound("low_threshold", -1.0)))))


def leading_of_gaps(candidate: Tensor, score: Tensor) -> Tensor:
    """The candidate of largest score in each run of neighbouring candidates, the first of equals; [rows, width]."""
    rows, width = candidate.shape
    before = torch.nn.functional.pad(candidate, (1, 0))[:, :-1]
    gap = (candidate & ~before).cumsum(dim=1) * candidate
    position = torch.arange(width, device=candidate.device).expand(rows, width)
    score = score.masked_fill(~candidate, -torch.inf)
    most = score.new_full((rows, width + 1), -torch.inf).scatter_reduce(1, gap, score, "amax")
    leads = candidate & (score == most.gather(1, gap))
    first = position.new_full((rows, width + 1), width)
    first = first.scatter_reduce(1, gap, position.where(leads, width), "amin")
    return candidate & (position == first.gather(1, gap))


class HierarchyRemask(Hierarchy):
    """Commit as `hierarchy` does, and open again what the model is no longer sure of in the block.

    Committed positions where no token reaches a confidence count as gaps too: the surest of them take their new token,
    the others are masked again, and at least one position more is committed than was opened.
    dInfer, arXiv 2510.08666, hierarchical decoding with remasking.
    """

    name = "hierarchy_remask"
    revises = True

    class Params(Hierarchy.Params):
        remask_below: float = Field(
            0.4, ge=0, le=1, description="open committed positions of less confidence than this"
        )

    def select(self, step: Step) -> Selection:
        assert step.given is not None
        known = (step.confidence > -torch.inf) & ~step.masked & ~step.given
        opened = known & (step.confidence < step.param("remask_below"))
        everything = replace(step, candidate=step.candidate | opened)
        chosen = super().select(everything).commit
        missing = opened.sum(dim=1, keepdim=True) + 1 - chosen.sum(dim=1, keepdim=True)
        chosen = chosen | best(step.confidence, everything.candidate & ~chosen, missing)
        commit = chosen & step.candidate
        return Selection(
            commit, replace=chosen & opened, remask=opened & ~chosen, done=torch.ones(len(commit), dtype=torch.bool)
        )
