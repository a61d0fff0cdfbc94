"""Dream's four rules, on its schedule of times."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from samplers.canvas import Layout
from samplers.contract import SamplerParams, Selection, Step
from samplers.forward.statistics import Statistic
from samplers.ranking import best
from samplers.schedule import ScheduledSampler, share_of


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

    class Params(SamplerParams):
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

    def select(self, step: Step) -> Selection:
        kinds = [getattr(params, "alg", "entropy") for params in step.params]
        scores = {
            "maskgit_plus": step.extra[Statistic.CHOSEN_CONFIDENCE],
            "topk_margin": step.extra[Statistic.CHOSEN_MARGIN],
            "entropy": -step.extra[Statistic.CHOSEN_ENTROPY],
        }
        share = shares(step)
        count = self.count(step, share)
        uniform = self.numbers(step, count)
        score = torch.stack([scores.get(kind, scores["entropy"])[row] for row, kind in enumerate(kinds)]).double()
        warmth = step.param("alg_temp").double()
        # Adding such noise and taking the best is to draw from the softmax without replacement.
        noise = -(-uniform.clamp(min=2.0**-53).log()).log()
        score = torch.where(warmth > 0, score / warmth.clamp(min=1e-9) + noise, score)
        chosen = self.surest(score, step.candidate, count)
        drawn = step.candidate & (uniform < share)
        origin = torch.tensor([kind == "origin" for kind in kinds], device=score.device)[:, None]
        return Selection(torch.where(origin, drawn, chosen))

    def count(self, step: Step, share: Tensor) -> Tensor:
        """Candidates that a share is, one at least, int64 [rows, 1]."""
        return (step.candidate.sum(dim=1, keepdim=True) * share).long().clamp(min=1)

    def surest(self, score: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
        """The `count` [rows, 1] candidates of highest score, bool [rows, width]."""
        return best(score, candidate, count)

    def numbers(self, step: Step, count: Tensor) -> Tensor:
        """Random numbers in [0, 1), [rows, width]."""
        return step.uniform()


def share_at(params: "Dream.Params", layout: Layout, block: int, s: int) -> float:
    """The share of its masks that a block commits at its step s."""
    steps = share_of(params.steps or layout.denoised_length, layout, block)
    times = torch.linspace(1, params.eps, steps + 1)
    return 1.0 if s + 1 >= steps else float(1 - times[s + 1] / times[s])


def shares(step: Step) -> Tensor:
    """The share of its candidates that each row commits, float32 [rows, 1]."""
    rows = []
    counters = zip(step.params, step.layouts, step.block.tolist(), step.block_step.tolist(), strict=True)
    for params, layout, (block,), (s,) in counters:
        assert isinstance(params, Dream.Params)
        rows.append(share_at(params, layout, block, s))
    return torch.tensor(rows, device=step.candidate.device)[:, None]
