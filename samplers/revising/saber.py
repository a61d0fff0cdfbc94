"""An adaptive threshold with remasking."""

import torch
from pydantic import Field

from samplers.contract import Sampler, SamplerParams, Selection, StateSpec, Step
from samplers.ranking import best


class Saber(Sampler[SamplerParams]):
    """Commit above the mean confidence of earlier commits, and mask again what lost most confidence since.

    Of k commits in a step, up to k - 1 positions are masked again, in number the larger of n / 2 and k / 8; none once
    all are committed. Saber, arXiv 2510.18165, sections 3.1 and 3.2.
    """

    name = "saber"
    paper = "https://arxiv.org/abs/2510.18165"
    revises = True
    counts_commits = True
    state = {
        # Confidence at commit of every position, and confidence one step ago; NaN: none.
        "committed": StateSpec(torch.nan, per="position", lives="generation"),
        "before": StateSpec(torch.nan, per="position", lives="generation"),
        # Sum and number of those commits, kept because a window does not cover the whole region.
        "sum": StateSpec(0.0, torch.float64, lives="generation"),
        "count": StateSpec(0, torch.int64, lives="generation"),
    }

    class Params(SamplerParams):
        n: int = Field(2, ge=1, le=1_000_000, description="least commits of a forward pass")

    def select(self, step: Step[SamplerParams]) -> Selection:
        stored, before, n = step.state["committed"], step.state["before"], step.param("n")
        total, count = step.state["sum"], step.state["count"]
        mean = torch.where(count > 0, total / count.clamp(min=1), 1.0)
        commit = step.candidate & (step.confidence > mean)
        few = commit.sum(dim=1, keepdim=True) < n
        commit = torch.where(few, best(step.confidence, step.candidate, n), commit)
        k = commit.sum(dim=1, keepdim=True)
        left = (step.candidate & ~commit).any(dim=1, keepdim=True)
        many = torch.minimum(torch.maximum(n // 2, -(-k // 8)), k - 1) * left
        # Positions committed now count too: a remasked one that was surer before may be masked once more.
        known = step.committed | commit
        drop = (before - step.confidence).nan_to_num(-torch.inf, posinf=-torch.inf)
        lost = best(drop, known & (drop > -torch.inf), many)
        again = commit & ~stored.isnan()
        stored_before = stored.where(again, 0.0).double().sum(dim=1, keepdim=True)
        total = total + step.confidence.where(commit, 0.0).double().sum(dim=1, keepdim=True) - stored_before
        count = count + (commit & stored.isnan()).sum(dim=1, keepdim=True)
        return Selection(
            commit & ~lost,
            remask=lost & step.committed,
            state={
                "committed": torch.where(commit, step.confidence, stored),
                "before": step.confidence.masked_fill(step.confidence == -torch.inf, torch.nan),
                "sum": total,
                "count": count,
            },
        )
