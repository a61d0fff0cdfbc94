"""Dream's four rules on its time schedule."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from samplers.contract import SamplerParams, Selection, Step
from samplers.forward.statistics import Statistic
from samplers.ranking import best
from samplers.schedule import ScheduledSampler

_SCORES = {"maskgit_plus": Statistic.CHOSEN_CONFIDENCE, "topk_margin": Statistic.CHOSEN_MARGIN}


class DreamParams(SamplerParams):
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = Field(
        "entropy", description="at random; by confidence; by margin; by entropy"
    )
    steps: int | None = Field(
        None, ge=1, le=1_000_000, description="forward passes for the whole generation (default: one a token)"
    )
    eps: float = Field(1e-3, ge=0, lt=1, description="the time at the end")
    alg_temp: float = Field(
        0.0, ge=0, le=100, description="draw positions from softmax(sureness / alg_temp); 0 takes the surest"
    )


class Dream(ScheduledSampler):
    """Unmask as Dream does: a share of the candidates that follows from the time, at random or the surest of them.

    Dream 7B, arXiv 2508.15487, its generation_utils.py. At step s of S the time falls from t to u on a straight line
    from 1 to `eps`, and the share is 1 - u / t, everything at the last step. Sure is what the distribution says that
    tokens are drawn from, after temperature, top-k and top-p. Where the share rounds to nothing, the surest candidate
    is committed all the same, where the original spends a forward for nothing.
    """

    name = "dream"
    paper = "https://arxiv.org/abs/2508.15487"
    statistics = frozenset({Statistic.CHOSEN_CONFIDENCE, Statistic.CHOSEN_ENTROPY, Statistic.CHOSEN_MARGIN})
    Params = DreamParams

    def select(self, step: Step[DreamParams]) -> Selection:  # type: ignore[override]
        share, columns = shares(step), step.columns
        if columns.all_have("alg", "origin"):
            return Selection(step.candidate & (self.numbers(step) < share))
        score = -step.extra[Statistic.CHOSEN_ENTROPY]
        for name, statistic in _SCORES.items():
            if columns.any_has("alg", name):
                score = torch.where(step.option("alg", name), step.extra[statistic], score)
        warmth = columns.exact("alg_temp").float().double()
        if columns.keep("warm", lambda: bool((warmth > 0).any())):
            # Taking the best after adding Gumbel noise draws from the softmax without replacement.
            noise = -(-self.numbers(step).clamp(min=2.0**-53).log()).log()
            score = score.double()
            score = torch.where(warmth > 0, score / warmth.clamp(min=1e-9) + noise, score)
        chosen = self.surest(score, step.candidate, self.count(step, share))
        if not columns.any_has("alg", "origin"):
            return Selection(chosen)
        drawn = step.candidate & (self.numbers(step) < share)
        return Selection(torch.where(step.option("alg", "origin"), drawn, chosen))

    def count(self, step: Step[DreamParams], share: Tensor) -> Tensor:
        """Number of candidates for a share, at least one, int64 [rows, 1]."""
        return (step.candidate.sum(dim=1, keepdim=True) * share).long().clamp(min=1)

    def surest(self, score: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
        """The `count` [rows, 1] candidates of highest score, bool [rows, width]."""
        return best(score, candidate, count)

    def numbers(self, step: Step[DreamParams]) -> Tensor:
        """Random numbers in [0, 1), [rows, width]."""
        return step.uniform()


def shares(step: Step[DreamParams]) -> Tensor:
    """Share of the candidates that each row commits, float32 [rows, 1]."""
    least, more, eps = step.columns.keep("times", lambda: _times(step))
    steps = least + (step.block < more)
    after = torch.cat([step.block_step, step.block_step + 1], dim=1)
    times = _time(after, steps, eps)
    return torch.where(after[:, 1:] >= steps, 1.0, 1 - times[:, 1:] / times[:, :1])


def _times(step: Step[DreamParams]) -> tuple[Tensor, Tensor, Tensor]:
    """Steps per block, number of leading blocks with one step more, and final time; [rows, 1] each."""
    steps = torch.where(step.given("steps"), step.param("steps", none=1), step.layout.denoised_length)
    return steps // step.layout.blocks, steps % step.layout.blocks, step.columns.exact("eps").float()


def _time(s: Tensor, steps: Tensor, eps: Tensor) -> Tensor:
    """Entry s of float32 linspace(1, eps, steps + 1), rounded as torch does: from the nearer end."""
    size = (eps - 1) / steps
    return torch.where(s < (steps + 1) // 2, 1 + size * s, eps - size * (steps - s))
